"""Dovetail: post-train language models by RL, with every stage a plain Python function.

This package and `dovetail.types`, `dovetail.config`, `dovetail.hooks` and `dovetail.cli` import
without torch.
"""

import os

# Read when torch loads its OpenMP runtime. By default idle threads spin at every barrier: on a
# machine with anything else to do, that made small training steps 12 times slower. Waiting costs an
# idle machine little, and an explicit setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
