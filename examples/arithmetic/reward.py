"""The rule reward of the arithmetic task, written as one writes it for slime."""

from __future__ import annotations


async def reward(args, sample, **kwargs) -> float:
    """1.0 for the right sum, 0.0 otherwise; its mean over held-out sums is their accuracy."""
    return float(sample.response.removesuffix("<eos>") == sample.label)
