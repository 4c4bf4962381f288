"""A slot and what the user wrote for it, bound to one callable, once, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.config.sections import HooksConfig
from dovetail.hooks.adapt import Invoke, adapt
from dovetail.hooks.load import load, split_family
from dovetail.hooks.match import match, place
from dovetail.hooks.spec import CallForm, HookSpec
from dovetail.hooks.table import HOOKS, spec_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoundHook:
    """A user's function, callable in the native form of its slot.

    The native forms: rollout and evaluation `async (RolloutCall) -> RolloutOutput | EvalOutput`;
    generate `async (GenerateCall) -> Sample | list[Sample]`; reward `async (sample) -> reward`,
    with group_rm `async (samples) -> list`; dynamic filter `async (group) -> DynamicFilterOutput`;
    buffer filter `(buffer, n) -> list[Group]`; reward post-process
    `(samples) -> (raw, rewards)`.
    """

    spec: HookSpec
    path: str
    """What the user wrote."""
    form: CallForm
    """The call form that was found."""
    source: str
    """file:line of the definition."""
    notice: str | None
    native: Callable[..., Any]
    invoke: Invoke

    def __call__(self, *values: Any) -> Any:
        return self.native(*values)


def bind(slot: str, target: Any, args: Any = None, *, family: str | None = None) -> BoundHook:
    """Load (if `target` is a path), match and adapt.

    `args` is handed to functions that take it; its `group_rm` decides whether rewards are given one
    sample or a group.

    Raises:
        HookError: there is no such slot, nothing is at the path, importing it failed, or its
            parameters fit no call form.
    """
    spec = spec_of(slot)
    path = target if isinstance(target, str) else place(target)
    if isinstance(target, str):
        forced, name = split_family(target)
        family, target = forced or family, load(spec, name)
    found = match(target, spec, family=family, batched=getattr(args, "group_rm", False), path=path)
    if found.notice:
        log.warning("%s: %s %s", spec.where, path, found.notice)
    invoke = Invoke(spec, target, found, args)
    return BoundHook(
        spec, path, found.form, place(target), found.notice, adapt(spec, invoke), invoke
    )


def bind_hooks(hooks: HooksConfig, args: Any = None) -> dict[str, BoundHook]:
    """Every hook that the run sets, by slot.

    Evaluation with the rollout function's path shares its object. A rollout function of a foreign
    form also evaluates when no evaluation function is set: it takes `evaluation` for that.

    Raises:
        HookError: as `bind`.
    """
    bound = {
        spec.slot: bind(spec.slot, path, args)
        for spec in HOOKS
        if (path := getattr(hooks, spec.leaf)) is not None
    }
    rollout = bound.get("rollout_function")
    if rollout is None:
        return bound
    same = hooks.eval_function_path == hooks.rollout_function_path
    foreign = hooks.eval_function_path is None and "native" not in rollout.form.families
    if same or foreign:
        spec = spec_of("eval_function")
        bound[spec.slot] = BoundHook(
            spec,
            rollout.path,
            rollout.form,
            rollout.source,
            None,
            adapt(spec, rollout.invoke),
            rollout.invoke,
        )
    return bound
