"""Reducers, as weights: the loss of a step is `sum(weights * per_token_loss)` over its tokens.

The weights are made once for a whole optimizer step, so any split into micro-batches sums to the
same loss and the same gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch


def row_weights(
    mask_sums_R: Sequence[int],
    rollouts_R: Sequence[int],
    per_token: bool,
    divisors_R: Sequence[int] | None = None,
) -> list[float]:
    """The weight of each trained token of row r.

    Mean over rollouts of token means: `1 / (trained tokens of the rollout x rollouts of the step)`;
    a rollout without trained tokens counts in the mean. `divisors_R` takes the place of the trained
    tokens of the row's rollout. `per_token`: `1 / trained tokens of the step`.
    """
    if per_token:
        total = sum(mask_sums_R)
        return [1.0 / total if total else 0.0] * len(mask_sums_R)
    of_rollout: dict[int, int] = defaultdict(int)
    for mask_sum, rollout in zip(mask_sums_R, rollouts_R, strict=True):
        of_rollout[rollout] += mask_sum
    divisors = [of_rollout[rollout] for rollout in rollouts_R] if divisors_R is None else divisors_R
    return [1.0 / (divisor * len(of_rollout)) if divisor else 0.0 for divisor in divisors]


def whiten(advantages_N: torch.Tensor, counts_N: torch.Tensor) -> torch.Tensor:
    """Advantages with mean 0 and variance 1 over all trained tokens, [N].

    `counts_N[i]` is how many tokens entry i stands for: its loss mask, or the trained tokens of a
    sample. Variance as in slime: the unbiased one, 1e-8 added under the root. Fewer than two
    tokens: only centred.
    """
    counts_N = counts_N.to(torch.float64)
    values_N = advantages_N.to(torch.float64)
    total, weighted = counts_N.sum(), (values_N * counts_N).sum()
    if total == 0:
        return advantages_N
    centred_N = values_N - weighted / total
    squares = (centred_N.square() * counts_N).sum()
    if total < 2:
        return centred_N.to(advantages_N.dtype)
    scale = torch.rsqrt(squares / (total - 1) + 1e-8)
    return (centred_N * scale).to(advantages_N.dtype)
