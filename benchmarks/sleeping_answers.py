"""A generate function that takes a fixed time per token and computes nothing: what is left of a run
is what its loop overlaps."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from benchmarks.simulate_check import LIMIT, TOKEN_S


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """An answer with a geometric length of 12 tokens on average, one in ten of the longest."""
    rng = random.Random(f"{sample.index}")
    long = rng.random() < 0.1
    length = LIMIT if long else min(LIMIT, 1 + int(rng.expovariate(1 / 11)))
    await asyncio.sleep(length * TOKEN_S)
    prompt = sample.tokens or [2 + rng.randrange(10) for _ in range(6)]
    sample.tokens = [*prompt, *(2 + rng.randrange(10) for _ in range(length))]
    sample.response = "0" * length
    sample.response_length = length
    sample.rollout_log_probs = [-2.7] * length
    sample.loss_mask = [1] * length
    sample.status = sample.Status.COMPLETED
    return sample
