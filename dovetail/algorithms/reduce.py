"""Reducers, as weights: the loss of a step is `sum(weights * per_token_loss)` over its tokens.

The weights are made once for a whole optimizer step, so any split into micro-batches sums to the
same loss and the same gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch


def row_weights(
    mask_sums_R: Sequence[int], rollouts_R: Sequence[int], per_token: bool
) -> list[float]:
    """The weight of each trained token of row r.

    Mean over rollouts of token means: `1 / (trained tokens of the rollout x rollouts of the step)`;
    a rollout without trained tokens counts in the mean. `per_token`: `1 / trained tokens of the
    step`.
    """
    if per_token:
        total = sum(mask_sums_R)
        return [1.0 / total if total else 0.0] * len(mask_sums_R)
    of_rollout: dict[int, int] = defaultdict(int)
    for mask_sum, rollout in zip(mask_sums_R, rollouts_R, strict=True):
        of_rollout[rollout] += mask_sum
    return [
        1.0 / (of_rollout[rollout] * len(of_rollout)) if of_rollout[rollout] else 0.0
        for rollout in rollouts_R
    ]


def whiten(advantages_S: torch.Tensor, mask_sums_S: torch.Tensor) -> torch.Tensor:
    """Advantages with mean 0 and variance 1 over all trained tokens, [S].

    Sample i stands for `mask_sums_S[i]` tokens of equal advantage. Variance as in slime: the
    unbiased one, 1e-8 added under the root. Fewer than two tokens: only centred.
    """
    counts_S = mask_sums_S.to(torch.float64)
    values_S = advantages_S.to(torch.float64)
    total = counts_S.sum()
    if total == 0:
        return advantages_S
    mean = (values_S * counts_S).sum() / total
    centred_S = values_S - mean
    if total < 2:
        return centred_S.to(advantages_S.dtype)
    variance = (centred_S.square() * counts_S).sum() / (total - 1)
    return (centred_S * torch.rsqrt(variance + 1e-8)).to(advantages_S.dtype)
