"""Command-line agents that run in a sandbox."""

from dovetail.compat.agent.harness.claude_code import CLAUDE_CODE, ClaudeCodeHarness
from dovetail.compat.agent.harness.codex import CODEX, CodexHarness
from dovetail.compat.agent.harness.common import BaseHarness, HarnessContext

__all__ = [
    "CLAUDE_CODE",
    "CODEX",
    "BaseHarness",
    "ClaudeCodeHarness",
    "CodexHarness",
    "HarnessContext",
]
