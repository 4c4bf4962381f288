"""A slot and what the user wrote for it, bound to one callable, once, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dovetail.config.sections import HooksConfig
from dovetail.hooks.adapt import adapt
from dovetail.hooks.invoke import Invoke
from dovetail.hooks.load import admit_foreign_imports, load, split_family
from dovetail.hooks.match import match, place
from dovetail.hooks.own_flags import own_defaults
from dovetail.hooks.spec import OWNERS, CallForm, HookSpec, Kind
from dovetail.hooks.table import HOOKS, spec_of
from dovetail.types import HookError, HookRunError, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoundHook:
    """A user's function, callable in the native form of its slot.

    The native forms, by slot:

    - data_source `(DataSourceCall) -> UserSource`; buffer_filter `(buffer, n) -> groups`
    - rollout_function, eval_function `async (RolloutCall) -> RolloutOutput | EvalOutput`
    - custom_generate_function `async (GenerateCall) -> Sample | list[Sample]`
    - rollout_sample_hook `async (sample, rollout_id, evaluation) -> Sample`
    - custom_rm `async (sample) -> reward`, with group_rm `async (samples) -> list`
    - dynamic_sampling_filter `async (group) -> DynamicFilterOutput`
    - rollout_sample_filter `async (groups)`
    - rollout_all_samples_process `async (groups, data_source)`
    - custom_rollout_log_function `(rollout_id, samples, metrics, time_s) -> bool`
    - custom_eval_rollout_log_function `(rollout_id, data, metrics) -> bool`
    - custom_reward_post_process `(samples) -> (raw, rewards)`
    - custom_convert_samples_to_train_data `(samples) -> dict of lists`
    - rollout_data_postprocess `(rollout_id, data, samples)`
    - custom_advantage_function `(data)`, which sets advantages and returns in it
    - custom_loss_function `(LossCall)`, or of a family's form `(batch, logits, reducer)`,
      `-> (loss, metrics)`
    - custom_tis_function `(CorrectionCall) -> (pg_loss, masks, metrics)`
    - custom_pg_loss_reducer_function `(ReducerCall) -> reducer`
    - router_middleware `async (request, call_next)`, or of the class form `(app, router) -> object`
    - a list of tools `() -> list`; others as their form, without `args`, by position or name
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
    parts: tuple[BoundHook, ...] = ()
    """Of a hook that may be given several times: each of them, in order."""

    @property
    def has_time_limit(self) -> bool:
        """Whether a call ends by itself when it takes too long, with a TimeoutError."""
        return self.invoke.limit_s is not None

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self.native(*values, **named)


def bind(slot: str, target: Any, args: Any = None, *, family: str | None = None) -> BoundHook:
    """Load (if `target` is a path), match and adapt.

    `args` is handed to functions that take it; its `group_rm` decides whether rewards are given one
    sample or a group, and it has the time limits.

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
    for name, default in own_defaults(target).items():
        if args is not None and not hasattr(args, name):
            setattr(args, name, default)
    invoke = Invoke(spec, target, found, args)
    native = adapt(spec, invoke)
    if spec.kind is Kind.OBJECT:
        _check_object(native)
    return BoundHook(spec, path, found.form, place(target), found.notice, native, invoke)


def bind_hooks(
    hooks: HooksConfig, args: Any = None, owners: Collection[str] = frozenset()
) -> dict[str, BoundHook]:
    """Every hook that the run sets, by slot.

    Evaluation with the rollout function's path shares its object. A rollout function of a foreign
    form also evaluates when no evaluation function is set: it takes `evaluation` for that.

    Args:
        hooks: the run's `[hooks]` section.
        args: what functions are handed as `args`.
        owners: which of OWNERS this run has.

    Raises:
        HookError: as `bind`; or what calls the hook is no part of this run.
    """
    if hooks.compat_imports:
        admit_foreign_imports()
    bound = {}
    for spec in HOOKS:
        paths = getattr(hooks, spec.leaf)
        if not paths:
            continue
        every = tuple(bind(spec.slot, path, args) for path in _listed(paths))
        if spec.owner is not None and spec.owner not in owners:
            raise HookError(
                f"{spec.where}: {every[0].path} is called by {OWNERS[spec.owner]}, and this run "
                "has none; leave the flag out"
            )
        bound[spec.slot] = _in_a_row(spec, every) if spec.repeatable else every[0]
    rollout = bound.get("rollout_function")
    if rollout is None:
        return bound
    same = hooks.eval_function_path == hooks.rollout_function_path
    foreign = hooks.eval_function_path is None and "native" not in rollout.form.families
    if same or foreign:
        spec = spec_of("eval_function")
        invoke = rollout.invoke
        bound[spec.slot] = replace(
            rollout, spec=spec, notice=None, native=adapt(spec, invoke), invoke=invoke
        )
    return bound


def _listed(paths: str | Sequence[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _check_object(native: Callable[[], Any]) -> None:
    try:
        native()
    except HookRunError as error:
        raise HookError(str(error)) from None


def _in_a_row(spec: HookSpec, every: tuple[BoundHook, ...]) -> BoundHook:
    """Sample hooks, each with what the one before it made; of other slots the owner takes the
    parts."""

    async def chained(sample: Sample, *values: Any, **named: Any) -> Sample:
        for hook in every:
            sample = await hook(sample, *values, **named)
        return sample

    first = every[0]
    native = chained if spec.slot == "rollout_sample_hook" else first.native
    return replace(first, path=", ".join(hook.path for hook in every), native=native, parts=every)
