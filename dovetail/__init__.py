"""Dovetail: post-train language models with reinforcement learning, every stage a plain Python function.

This package and `dovetail.types`, `dovetail.config`, `dovetail.hooks`, `dovetail.cli` import without torch.
"""

__version__ = "0.1.0"
