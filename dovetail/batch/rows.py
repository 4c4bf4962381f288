"""What training needs of one sequence, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dovetail.types.errors import TrainError
from dovetail.types.sample import Sample


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
    raw_reward: Any = 0.0
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
    """True: a hook made the reward (post-process or conversion); it is the advantage as it
    stands."""
    mask_sum: int | None = None
    """What the token losses of its rollout are divided by; None: the rollout's trained tokens."""
    metadata: Any = field(default_factory=dict)
    train_metadata: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Everything else that the training data has of this sequence, for hooks."""
    sample: Sample | None = None
    """What it was made of, if that is known."""

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


def check_ids(rows: Iterable[TrainRow], vocab_size: int) -> None:
    """Refuse token ids that a model of this vocabulary does not have.

    Raises:
        TrainError: a row has one; the message names the sample's index.
    """
    for row in rows:
        lowest, highest = min(row.tokens), max(row.tokens)
        if lowest < 0 or highest >= vocab_size:
            raise TrainError(
                f"sample {row.index}: token id {lowest if lowest < 0 else highest} is none of the "
                f"model's, expected 0 to {vocab_size - 1}; make tokens with the tokenizer of "
                "--hf-checkpoint (TOML: model.hf_checkpoint)"
            )
