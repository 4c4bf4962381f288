"""What a step's or an evaluation's samples look like in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dovetail.rewards.rules import PARTS
from dovetail.rollout.admit import Admission
from dovetail.rollout.generate import status_of
from dovetail.types import Group, RolloutError, Sample


def reward_value(sample: Sample, reward_key: str | None) -> float:
    """The number in `sample.reward`.

    Raises:
        RolloutError: it is missing, or a dict that does not have `reward_key`.
    """
    reward = sample.reward
    if isinstance(reward, dict):
        if reward_key is None or reward_key not in reward:
            raise RolloutError(
                f"the reward of sample {sample.index} is a dict with the keys {sorted(reward)}, "
                f"and reward_key is {reward_key!r}; name one of them with --reward-key (TOML "
                "reward.reward_key)"
            )
        reward = reward[reward_key]
    if reward is None:
        raise RolloutError(
            f"sample {sample.index} of group {sample.group_index} has no reward; choose one with "
            "--rm-type or --custom-rm-path (TOML: reward.rm_type, hooks.custom_rm_path)"
        )
    return float(reward)


def known_rewards(group: Group, reward_key: str | None) -> list[float]:
    """The rewards of the samples, in order, less those that failed: they say nothing.

    Raises:
        RolloutError: as `reward_value`.
    """
    rewards = [(sample, reward_value(sample, reward_key)) for sample in group]
    return [reward for sample, reward in rewards if "reward_error" not in sample.metadata]


def rollout_rewards(group: Group, reward_key: str | None) -> list[float]:
    """The known reward of each rollout: the mean of the samples that it fanned out into.

    Raises:
        RolloutError: as `reward_value`.
    """
    rollouts: dict[tuple[str, int], Group] = {}
    for position, sample in enumerate(group):
        own = sample.rollout_id
        key = ("alone", position) if own is None else ("shared", own)
        rollouts.setdefault(key, []).append(sample)
    rewards = [known_rewards(samples, reward_key) for samples in rollouts.values()]
    return [mean(own) for own in rewards if own]


def shape_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Lengths and ends of responses, and the parts of their rewards, without a prefix."""
    lengths = [sample.response_length for sample in samples]
    return {
        "response_length": mean(lengths),
        "response_length_max": float(max(lengths, default=0)),
        "truncated": mean(status_of(s) is Sample.Status.TRUNCATED for s in samples),
        **part_means(samples),
    }


def part_means(samples: Sequence[Sample]) -> dict[str, float]:
    """`reward_parts/<name>`: the mean score of each term of weighted sums, over the samples that
    have it; failed ones have none."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        parts = sample.metadata.get(PARTS)
        if not isinstance(parts, dict) or "reward_error" in sample.metadata:
            continue
        for name, score in parts.items():
            if isinstance(score, int | float):
                scores.setdefault(str(name), []).append(score)
    return {f"{PARTS}/{name}": mean(values) for name, values in scores.items()}


def columns(samples: Sequence[Sample], reward_key: str | None) -> dict[str, list[Any]]:
    """`rewards`, `truncated` and `samples` of an evaluation set, as log functions of the slime
    family read them."""
    return {
        "rewards": [_entry(sample.reward, reward_key) for sample in samples],
        "truncated": [status_of(s) is Sample.Status.TRUNCATED for s in samples],
        "samples": list(samples),
    }


def sample_metrics(
    groups: Sequence[Group], reward_key: str | None, prefix: str = "rollout"
) -> dict[str, float]:
    """What can be told of any samples: rewards if all are numbers, lengths and ends."""
    samples = [sample for group in groups for sample in group]
    rewards = [_entry(sample.reward, reward_key) for sample in samples]
    metrics = shape_metrics(samples)
    if rewards and all(isinstance(reward, int | float) for reward in rewards):
        metrics["reward"] = mean(
            reward for group in groups for reward in rollout_rewards(group, reward_key)
        )
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _entry(reward: Any, key: str | None) -> Any:
    return reward.get(key, reward) if isinstance(reward, dict) else reward


def rollout_metrics(
    groups: Sequence[Group],
    admission: Admission,
    new_tokens: int,
    reward_key: str | None,
    reward_objects: bool = False,
) -> dict[str, float]:
    """`rollout/...` of one step: the kept samples, and what became of all groups.

    With `reward_objects` rewards may be objects that no key reads; then nothing is told of them.
    """
    samples = [sample for group in groups for sample in group]
    unread = reward_objects and reward_key is None
    told = not (unread and any(isinstance(sample.reward, dict) for sample in samples))
    metrics = {
        **(_reward_metrics(groups, reward_key) if told else {}),
        **shape_metrics(samples),
        "tokens": float(sum(sample.response_length for sample in samples)),
        "generated_tokens": float(new_tokens),
        "removed_samples": float(sum(sample.remove_sample for sample in samples)),
        "resumed_samples": float(sum("start_rollout_id" in s.metadata for s in samples)),
        "prefix_cache_hit_rate": _cached(samples),
        "non_generation_s": mean(sample.non_generation_time for sample in samples),
        "issued_groups": float(admission.issued),
        "dropped_groups": float(admission.dropped.total()),
        "failed_groups": float(admission.failed.total()),
        "put_back_groups": float(admission.put_back),
        "discarded_groups": float(admission.discarded),
        **{f"dynamic_filter/drop_{why}": float(n) for why, n in sorted(admission.dropped.items())},
        **{f"failed/{why}": float(n) for why, n in sorted(admission.failed.items())},
    }
    return {f"rollout/{name}": value for name, value in metrics.items()}


def lag_metrics(groups: Sequence[Group], step: int, max_lag: int) -> dict[str, float]:
    """`rollout/lag...` of a step that trains weights of version `step`: how many publishes lie
    between them and the oldest token of each sample, and how many samples have which lag.

    Samples whose engine does not tell versions are left out.
    """
    oldest = [sample.oldest_weight_version for group in groups for sample in group]
    lags = [max(0, step - version) for version in oldest if version is not None]
    counts = {f"lag_{lag}_samples": float(lags.count(lag)) for lag in range(max_lag + 1)}
    metrics = {"lag_mean": mean(lags), "lag_max": float(max(lags, default=0)), **counts}
    return {f"rollout/{name}": value for name, value in metrics.items()}


def _reward_metrics(groups: Sequence[Group], reward_key: str | None) -> dict[str, float]:
    rewards = [rollout_rewards(group, reward_key) for group in groups]
    known = [known_rewards(group, reward_key) for group in groups]
    return {
        "reward": mean(reward for group in rewards for reward in group),
        "reward_std": mean(deviation(group) for group in rewards),
        "groups_all_equal": mean(max(group) == min(group) for group in known if group),
    }


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation; 0.0 of fewer than two."""
    centre = mean(values)
    return math.sqrt(mean((value - centre) ** 2 for value in values))


def _cached(samples: Sequence[Sample]) -> float:
    total = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    cached = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    return cached / total if total else 0.0
