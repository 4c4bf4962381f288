"""Records that miles' rollout and generate functions are handed and give back, under miles' names.

They hold the same objects as our own calls. slime and vime use the two outputs as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dovetail.types.sample import Sample


@dataclass(frozen=True)
class RolloutFnConstructorInput:
    """What the constructor of a rollout class gets, once."""

    args: Any
    data_source: Any


@dataclass(frozen=True)
class RolloutFnBaseInput:
    """What every call of a rollout object gets."""

    rollout_id: int

    @property
    def evaluation(self) -> bool:
        """Whether samples are to be evaluated instead of trained on."""
        raise NotImplementedError("a RolloutFnTrainInput or a RolloutFnEvalInput says it")


@dataclass(frozen=True)
class RolloutFnTrainInput(RolloutFnBaseInput):
    """Samples of one training step are wanted."""

    weight_version: int | None = None

    @property
    def evaluation(self) -> bool:
        """False."""
        return False


@dataclass(frozen=True)
class RolloutFnEvalInput(RolloutFnBaseInput):
    """One evaluation is wanted."""

    generate_state: Any = None
    weight_version: int | None = None
    hf_dir: str | None = None

    @property
    def evaluation(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class GenerateFnInput:
    """What a generate function of the new style gets: one sample to answer."""

    state: Any
    """Has args, tokenizer, processor and aborted."""
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool = False

    @property
    def args(self) -> Any:
        """The configuration, as `state` has it."""
        return self.state.args


@dataclass(frozen=True)
class GenerateFnOutput:
    """The answered sample, or those that it fanned out into."""

    samples: Sample | list[Sample]


@dataclass
class RolloutFnTrainOutput:
    """Samples of one step: groups, or a flat list."""

    samples: list[Any]
    metrics: dict[str, Any] | None = None


@dataclass
class RolloutFnEvalOutput:
    """By set name: lists under `rewards`, `truncated` and, where there are any, `samples`."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None
