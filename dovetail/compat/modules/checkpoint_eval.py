"""`rollout.checkpoint_eval` (miles): evaluation of a saved model by whatever the user has."""

from __future__ import annotations

import abc
import copy
import inspect
from typing import Any

from dovetail.compat.modules.base_types import (
    BaseRolloutFn,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
)
from dovetail.compat.modules.misc import load_function
from dovetail.types import HookRunError

__all__ = ["CheckpointEvalFn", "EvalSkip", "is_checkpoint_eval_fn", "retarget_args"]


class EvalSkip(Exception):
    """Raised by an evaluation that leaves this time out, with the reason for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CheckpointEvalFn(BaseRolloutFn, abc.ABC):
    """An evaluation that takes a Hugging Face directory: subclasses write `evaluate_checkpoint`."""

    @abc.abstractmethod
    async def evaluate_checkpoint(
        self, checkpoint_dir: str, input: RolloutFnEvalInput
    ) -> RolloutFnEvalOutput:
        """The results for the model in `checkpoint_dir`."""

    async def __call__(self, input: RolloutFnInput) -> RolloutFnEvalOutput:
        """The results for the model of this evaluation.

        Raises:
            HookRunError: called for training, or there is no directory of the model.
        """
        if not isinstance(input, RolloutFnEvalInput):
            raise HookRunError(
                f"{type(self).__name__} only evaluates; the training rollout is another function "
                "(--rollout-function-path, TOML: hooks.rollout_function_path)"
            )
        if input.hf_dir is None:
            raise HookRunError(
                f"{type(self).__name__} evaluates a saved model, and this evaluation has none; "
                "have one written with --save-hf (TOML: checkpoint.save_hf)"
            )
        return await self.evaluate_checkpoint(input.hf_dir, input)


def retarget_args(
    args: Any, router_ip: str, router_port: int, num_gpus: int, num_gpus_per_engine: int
) -> Any:
    """A copy of `args` that points at other engines, so that everything runs against those."""
    other = copy.copy(args)
    for family in ("sglang", "vllm"):
        setattr(other, f"{family}_router_ip", router_ip)
        setattr(other, f"{family}_router_port", router_port)
    other.rollout_num_gpus = num_gpus
    other.rollout_num_gpus_per_engine = num_gpus_per_engine
    return other


def is_checkpoint_eval_fn(eval_function_path: str | None) -> bool:
    """Whether the path names a subclass of `CheckpointEvalFn`."""
    found = load_function(eval_function_path)
    return inspect.isclass(found) and issubclass(found, CheckpointEvalFn)
