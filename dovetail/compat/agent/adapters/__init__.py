"""Protocols that agents speak."""

from dovetail.compat.agent.adapters.anthropic import AnthropicAdapter
from dovetail.compat.agent.adapters.openai import OpenAIAdapter

__all__ = ["AnthropicAdapter", "OpenAIAdapter"]
