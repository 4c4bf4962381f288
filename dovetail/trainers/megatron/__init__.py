"""Megatron-core as a training backend."""

FORMAT = "dovetail-megatron-torch_dist-1"
"""In the facts of a saved state: only such a one is read."""
