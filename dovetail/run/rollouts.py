"""The rollout side of a run: what collects samples and what evaluates, with the user's functions in
their places."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from dovetail.hooks import BoundHook
from dovetail.rollout.evaluate import Evaluation
from dovetail.rollout.rollout import Rollout
from dovetail.rollout.sft import SftRollout
from dovetail.run.parts import Collect, Evaluate
from dovetail.run.report import Reporter
from dovetail.types import RolloutCall

if TYPE_CHECKING:
    from dovetail.run.build import Parts


def make_collect(parts: Parts, reporter: Reporter) -> Collect:
    """What gives the samples of a step."""
    config = parts.config
    if parts.replay is not None:
        return parts.replay
    assert parts.source is not None
    if config.is_sft:
        return SftRollout(parts.source, config.rollout.rollout_batch_size)
    default = Rollout(
        parts.engine,
        parts.models.tokenizer,
        parts.source,
        parts.scorer,
        config.rollout,
        seed=config.data.rollout_seed,
        generate=parts.hooks.get("custom_generate_function"),
        group_filter=parts.hooks.get("dynamic_sampling_filter"),
        group_rm=config.reward.group_rm,
        reward_key=config.reward.reward_key,
        max_context_len=parts.models.context_len,
        on_progress=reporter.rollout_progress,
    )
    hook = parts.hooks.get("rollout_function")
    return default if hook is None else _by_hook(parts, hook, default)


def make_evaluator(parts: Parts, reporter: Reporter) -> Evaluate | None:
    """What evaluates; None without evaluation sets and without a function of the user's."""
    hook = parts.hooks.get("eval_function")
    if not parts.samples or (not parts.eval_sets and hook is None):
        return None
    default = Evaluation(
        parts.engine,
        parts.models.tokenizer,
        parts.eval_sets,
        parts.scorer,
        seed=parts.config.data.rollout_seed,
        generate=parts.hooks.get("custom_generate_function"),
        group_rm=parts.config.reward.group_rm,
        max_context_len=parts.models.context_len,
        log_passrate=parts.config.observe.log_passrate,
        on_progress=reporter.eval_progress,
    )
    return default if hook is None else _by_hook(parts, hook, default, evaluation=True)


def _by_hook(
    parts: Parts,
    hook: BoundHook,
    default: Callable[[int], Awaitable[Any]],
    evaluation: bool = False,
) -> Callable[[int], Awaitable[Any]]:
    """A user's rollout or evaluation function, called with the parts that the default one
    uses.
    """

    async def call(rollout_id: int) -> Any:
        given = RolloutCall(
            rollout_id,
            evaluation=evaluation,
            data_source=parts.source,
            engine=parts.engine,
            tokenizer=parts.models.tokenizer,
            scorer=parts.scorer,
            default=default,
            weight_version=rollout_id,
        )
        return await hook(given)

    return call
