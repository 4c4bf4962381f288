"""Dovetail: post-train language models by RL, with every stage a plain Python function.

This package and `dovetail.types`, `dovetail.config`, `dovetail.hooks` and `dovetail.cli` import
without torch.
"""

import os

# Read when torch loads GNU's OpenMP runtime. By default idle threads spin for milliseconds at
# every barrier: on a machine with anything else to do, that made small training steps 12 times
# slower. This spins for some microseconds, then waits; an explicit setting wins.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
