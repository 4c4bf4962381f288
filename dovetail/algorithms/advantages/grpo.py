"""Group-relative advantages."""

from __future__ import annotations

from collections import defaultdict

import torch

from dovetail.algorithms.inputs import RewardBatch
from dovetail.config.sections import AlgorithmConfig
from dovetail.types.errors import TrainError

STD_EPS = 1e-6
"""Added to the standard deviation, as in the slime family."""


def grpo(batch: RewardBatch, config: AlgorithmConfig) -> torch.Tensor:
    """`(r_i - mean(r)) / (std(r) + 1e-6)` over the group of sample i; one value per sample.

    The standard deviation is the unbiased one (n - 1). Groups may differ in size; a group of one,
    and a group whose rewards are all equal, gives exactly 0. A rollout that fanned out into several
    samples counts once, with the mean of their rewards. `rewards_normalization` off leaves rewards
    as they are, `grpo_std_normalization` off only centres them.

    Source: DeepSeekMath, arXiv 2402.03300, eq. 3 ff.; without the division Dr.GRPO, arXiv
    2503.20783.

    Returns:
        [S] float32.

    Raises:
        TrainError: a sample has no group where one is needed.
    """
    advantages_S = batch.rewards_S.to(torch.float64).clone()
    if not config.rewards_normalization:
        return advantages_S.float()
    for members in _members(batch).values():
        baseline, scale = _statistics(batch, members, config.grpo_std_normalization)
        index = torch.tensor(members)
        advantages_S[index] = (advantages_S[index] - baseline) / scale
    return advantages_S.float()


def _members(batch: RewardBatch) -> dict[int, list[int]]:
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(batch.groups_S):
        if batch.final_S[i]:
            continue
        if group is None:
            raise TrainError(
                f"sample at position {i} of the rollout has group_index None; group-normalised "
                "advantages need the group of every sample: set Sample.group_index, or "
                "--no-rewards-normalization (algorithm.rewards_normalization = false)"
            )
        members[group].append(i)
    return members


def _statistics(batch: RewardBatch, members: list[int], divide: bool) -> tuple[float, float]:
    per_rollout: dict[int, list[float]] = defaultdict(list)
    for i in members:
        if batch.in_baseline_S[i]:
            per_rollout[batch.rollouts_S[i]].append(float(batch.rewards_S[i]))
    rewards = [sum(values) / len(values) for values in per_rollout.values()]
    if not rewards:
        return 0.0, 1.0
    if min(rewards) == max(rewards):
        # The rounded mean of equal numbers may differ from them; over 1e-6 that would be seen.
        return rewards[0], 1.0
    mean = sum(rewards) / len(rewards)
    if not divide:
        return mean, 1.0
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return mean, variance**0.5 + STD_EPS
