"""Dovetail: post-train language models by RL, with every stage a plain Python function.

This package and `dovetail.types`, `dovetail.config`, `dovetail.hooks` and `dovetail.cli` import
without torch.
"""

__version__ = "0.1.0"
