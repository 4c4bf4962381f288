"""Samples become rows: the numbers training needs of a sample, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.types.errors import HookError, TrainError
from dovetail.types.sample import Sample

RewardPostProcess = Callable[[list[Sample]], tuple[Sequence[float], Sequence[float]]]
"""`samples -> (raw rewards, rewards that advantages start from)`, both in the order of the
samples."""


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One trainable sequence.

    Raises:
        TrainError: lengths do not fit together; the message names the sample's index.

    Example:
        >>> TrainRow(tokens=[5, 6, 7], response_length=1, loss_mask=[1], reward=1.0).prompt
        [5, 6]
    """

    tokens: list[int]
    """Prompt ids, then response ids."""
    response_length: int
    loss_mask: list[int]
    """[response_length] of 0 or 1: which response tokens are trained on."""
    reward: float = 0.0
    """What the advantage starts from."""
    raw_reward: float = 0.0
    """What the reward function said."""
    rollout_logprobs: list[float] | None = None
    """[response_length] from the engine; None: unknown, left out of the comparison metrics."""
    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    """Rows of one fanned-out execution share it; None: the row stands alone."""
    in_baseline: bool = True
    """False: the reward failed; it stays out of its group's statistics."""
    reward_is_final: bool = False
    """True: a reward post-process hook made the reward; it is the advantage as it stands."""
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.response_length < max(len(self.tokens), 1):
            raise TrainError(
                f"sample {self.index}: response_length {self.response_length} of "
                f"{len(self.tokens)} tokens; expected at least one prompt token before the response"
            )
        aligned = [("loss_mask", self.loss_mask), ("rollout_log_probs", self.rollout_logprobs)]
        for name, values in aligned:
            if values is not None and len(values) != self.response_length:
                raise TrainError(
                    f"sample {self.index}: {name} has {len(values)} entries, expected "
                    f"{self.response_length}, the response_length (observed tokens need them too)"
                )
        if not math.isfinite(self.reward):
            raise TrainError(f"sample {self.index}: reward {self.reward}, expected a finite number")

    @property
    def prompt(self) -> list[int]:
        """Ids before the response."""
        return self.tokens[: len(self.tokens) - self.response_length]

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length


def rows_from_samples(
    samples: Sequence[Sample],
    *,
    reward_key: str | None = None,
    needs_reward: bool = True,
    post_process: RewardPostProcess | None = None,
) -> list[TrainRow]:
    """One row per sample, in order.

    A sample with `remove_sample` keeps its place in the statistics of its group and trains nothing;
    one whose reward failed (`metadata["reward_error"]`) stays out of the statistics as well.
    Without `needs_reward` (SFT) a missing reward counts as 0.

    Raises:
        TrainError: a reward is missing, not a number or not finite, or lengths differ.
        HookError: the post-process hook gave lists of another length.
    """
    raw = [_reward(sample, reward_key, needs_reward and post_process is None) for sample in samples]
    rewards = raw
    if post_process is not None:
        raw, rewards = _post_processed(post_process, list(samples))
    final = post_process is not None
    return [_row(sample, raw[i], rewards[i], final) for i, sample in enumerate(samples)]


def _row(sample: Sample, raw: float, reward: float, final: bool) -> TrainRow:
    length = sample.response_length
    mask = [1] * length if sample.loss_mask is None else [int(m) for m in sample.loss_mask]
    failed = "reward_error" in sample.metadata
    if sample.remove_sample:
        mask = [0] * len(mask)
    return TrainRow(
        tokens=list(sample.tokens),
        response_length=length,
        loss_mask=mask,
        reward=reward,
        raw_reward=raw,
        rollout_logprobs=sample.rollout_log_probs,
        group_index=sample.group_index,
        index=sample.index,
        rollout_id=sample.rollout_id,
        in_baseline=not failed,
        reward_is_final=final,
        metadata=sample.metadata,
        train_metadata=sample.train_metadata,
    )


def _reward(sample: Sample, key: str | None, needed: bool) -> float:
    reward = sample.reward
    if isinstance(reward, dict) and key is not None:
        if key not in reward:
            raise TrainError(
                f"sample {sample.index}: reward has no key {key!r}, got {sorted(reward)} "
                "(--reward-key, TOML: reward.reward_key)"
            )
        reward = reward[key]
    if isinstance(reward, dict):
        if not needed:
            return 0.0
        raise TrainError(
            f"sample {sample.index}: reward is an object with keys {sorted(reward)}, expected a "
            "number; name one with --reward-key (TOML: reward.reward_key)"
        )
    if reward is None and not needed:
        return 0.0
    try:
        return float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TrainError(
            f"sample {sample.index}: reward {reward!r}, expected a number; "
            "score it in the rollout, or set --rm-type (TOML: reward.rm_type) or --custom-rm-path"
        ) from None


def _post_processed(
    post_process: RewardPostProcess, samples: list[Sample]
) -> tuple[list[float], list[float]]:
    raw, rewards = post_process(samples)
    for name, values in (("first (raw rewards)", raw), ("second (rewards)", rewards)):
        if len(values) != len(samples):
            raise HookError(
                f"--custom-reward-post-process-path: its {name} list has {len(values)} entries, "
                f"expected {len(samples)}, one per sample"
            )
    return [float(value) for value in raw], [float(value) for value in rewards]
