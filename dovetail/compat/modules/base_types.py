"""`rollout.base_types`: what rollout functions are handed and give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dovetail.types.family import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnBaseInput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)

RolloutFnInput = RolloutFnTrainInput | RolloutFnEvalInput
RolloutFnOutput = RolloutFnTrainOutput | RolloutFnEvalOutput


class BaseRolloutFn:
    """A rollout function that is an object: made once, called for every step and evaluation."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = input.args, input.data_source

    def __call__(self, input: RolloutFnInput) -> Any:
        """The samples of one step or the results of one evaluation, or an awaitable of them."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__(self, input)")

    def dispose(self) -> None:
        """The run ends."""


def call_rollout_fn(
    fn: Callable[..., Any], *args: Any, evaluation: bool, **kwargs: Any
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Call a function of slime's form; whatever it gives back is put into the output's record."""
    given = fn(*args, **kwargs, evaluation=evaluation)
    if isinstance(given, RolloutFnTrainOutput | RolloutFnEvalOutput):
        return given
    return RolloutFnEvalOutput(data=given) if evaluation else RolloutFnTrainOutput(samples=given)


__all__ = [
    "BaseRolloutFn",
    "GenerateFnInput",
    "GenerateFnOutput",
    "RolloutFnBaseInput",
    "RolloutFnConstructorInput",
    "RolloutFnEvalInput",
    "RolloutFnEvalOutput",
    "RolloutFnInput",
    "RolloutFnOutput",
    "RolloutFnTrainInput",
    "RolloutFnTrainOutput",
    "call_rollout_fn",
]
