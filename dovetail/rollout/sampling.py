"""How a run samples: the knobs as `SamplingParams`, and one seed per sample from the run's seed."""

from __future__ import annotations

import hashlib

from dovetail.config.sections import RolloutConfig
from dovetail.types import SamplingParams


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`: equal parts give equal seeds on every machine and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rollout_sampling(rollout: RolloutConfig) -> SamplingParams:
    """What training samples with; the seed is set per sample."""
    return SamplingParams(
        max_new_tokens=rollout.rollout_max_response_len,
        min_new_tokens=rollout.rollout_min_new_tokens,
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        min_p=rollout.rollout_min_p,
        stop=tuple(rollout.rollout_stop),
        stop_token_ids=tuple(rollout.rollout_stop_token_ids),
        skip_special_tokens=rollout.rollout_skip_special_tokens,
    )
