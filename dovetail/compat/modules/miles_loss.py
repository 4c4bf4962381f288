"""The same under miles' addresses, whose `get_log_probs_and_entropy` gives its dict alone."""

from __future__ import annotations

from typing import Any

import torch

from dovetail.algorithms import packed_logits
from dovetail.algorithms.packed_logits import get_responses, get_sum_of_sample_mean
from dovetail.compat.modules.corrections import icepop_function, vanilla_tis_function
from dovetail.compat.modules.ppo import (
    compute_approx_kl,
    compute_gspo_kl,
    compute_policy_loss,
)

__all__ = [
    "compute_approx_kl",
    "compute_gspo_kl",
    "compute_policy_loss",
    "get_log_probs_and_entropy",
    "get_responses",
    "get_sum_of_sample_mean",
    "icepop_function",
    "vanilla_tis_function",
]


def get_log_probs_and_entropy(
    logits: torch.Tensor, *args: Any, **kwargs: Any
) -> dict[str, list[torch.Tensor]]:
    """`{"log_probs": [[R], ...]}`, with `with_entropy` also "entropy"; see
    `dovetail.algorithms.packed_logits`.
    """
    return packed_logits.get_log_probs_and_entropy(logits, *args, **kwargs)[1]
