"""Calling a user's functions out of a foreign rollout: by path, in whichever form they have."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dovetail.compat.modules.misc import load_function
from dovetail.hooks import BoundHook, bind
from dovetail.hooks.load import split_family
from dovetail.types import HookRunError, Sample
from dovetail.types.family import GenerateFnInput, GenerateFnOutput

_LEGACY_PARAMETERS = 3


@dataclass(frozen=True)
class GenerateInput(GenerateFnInput):
    """What a generate function of one parameter gets: miles' record, and what our call has."""

    default: Callable[[Sample, dict[str, Any]], Awaitable[Sample]] | None = None
    """The built-in generate function, on the same server."""

    @property
    def sampling(self) -> dict[str, Any]:
        """As `sampling_params`."""
        return self.sampling_params

    @property
    def tokenizer(self) -> Any:
        """The state's."""
        return self.state.tokenizer

    @property
    def processor(self) -> Any:
        """The state's."""
        return self.state.processor

    @property
    def aborted(self) -> bool:
        """True once the step has enough groups."""
        return bool(self.state.aborted)


async def call_generate(fn: Any, call: GenerateInput) -> Sample | list[Sample]:
    """What a user's generate function makes of a sample.

    Three parameters of which the first is not called `input` are slime's (args, sample,
    sampling_params), with `evaluation` where the signature has it; else it takes one record. A
    class is made without arguments.

    Raises:
        HookRunError: it gave back something else than samples.
    """
    target: Any = fn() if inspect.isclass(fn) else fn
    parameters = inspect.signature(target).parameters
    if len(parameters) >= _LEGACY_PARAMETERS and next(iter(parameters)) != "input":
        extra = {"evaluation": call.evaluation} if "evaluation" in parameters else {}
        made = target(call.args, call.sample, call.sampling_params, **extra)
    else:
        made = target(call)
    made = await made if inspect.isawaitable(made) else made
    made = made.samples if isinstance(made, GenerateFnOutput) else made
    many = made if isinstance(made, list) else [made]
    if not many or not all(isinstance(one, Sample) for one in many):
        raise HookRunError(
            f"the generate function {getattr(fn, '__qualname__', fn)} gave back "
            f"{type(made).__name__} for sample {call.sample.index}; expected a Sample or a list of "
            "Samples (--custom-generate-function-path, TOML: hooks.custom_generate_function_path)"
        )
    return made


async def apply_rollout_sample_hooks(
    args: Any,
    sample: Sample | list[Sample],
    *,
    rollout_id: int | None = None,
    evaluation: bool = False,
) -> Sample | list[Sample]:
    """Each sample after every function of `args.rollout_sample_hook_path`, in order.

    Raises:
        TypeError: one gave back neither None (keep) nor a Sample.
    """
    paths = getattr(args, "rollout_sample_hook_path", None) or []
    values = {"rollout_id": rollout_id, "evaluation": evaluation}
    for path in [paths] if isinstance(paths, str) else paths:
        hook = load_function(path)
        if isinstance(sample, list):
            sample = [await _hooked(hook, args, one, values) for one in sample]
        else:
            sample = await _hooked(hook, args, sample, values)
    return sample


async def _hooked(hook: Any, args: Any, sample: Sample, values: dict[str, Any]) -> Sample:
    parameters = inspect.signature(hook).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {name: value for name, value in values.items() if takes_all or name in parameters}
    made = hook(args, sample, **given)
    made = await made if inspect.isawaitable(made) else made
    if made is None:
        return sample
    if not isinstance(made, Sample):
        raise TypeError(
            f"the sample hook {getattr(hook, '__qualname__', hook)} gave back "
            f"{type(made).__name__}; expected a Sample, or None to keep the one it got"
        )
    return made


def bound(args: Any, leaf: str, slot: str) -> BoundHook | None:
    """The user's function of `args.<leaf>` in the native form of `slot`; None without one."""
    path = getattr(args, leaf, None)
    if not path:
        return None
    return bind(slot, load_function(path), args, family=split_family(path)[0])


def set_rewards(samples: list[Sample], rewards: list[Any]) -> None:
    """A reward for each sample.

    Raises:
        HookRunError: there are more or fewer.
    """
    if len(rewards) != len(samples):
        raise HookRunError(
            f"the reward function gave back {len(rewards)} rewards for {len(samples)} samples "
            "(--custom-rm-path, TOML: hooks.custom_rm_path)"
        )
    for sample, reward in zip(samples, rewards, strict=True):
        sample.reward = reward
