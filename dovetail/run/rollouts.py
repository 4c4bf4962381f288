"""The rollout side of a run: where prompts come from, what collects samples, what evaluates, with
the user's functions in their places."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.config.async_rules import STREAMS
from dovetail.data.build import build_source
from dovetail.data.family_source import RolloutDataSourceWithBuffer
from dovetail.hooks import BoundHook
from dovetail.rewards.vote import vote_of
from dovetail.rollout.check import check_samples
from dovetail.rollout.eval_metrics import Reading, Vote, set_metrics
from dovetail.rollout.evaluate import Evaluation
from dovetail.rollout.measure import columns, sample_metrics
from dovetail.rollout.rollout import Rollout
from dovetail.rollout.sft import SftRollout
from dovetail.rollout.stream import StreamRollout
from dovetail.rollout.waiting import BufferInput
from dovetail.run.collecting import Collect, Collecting, CollectingAhead
from dovetail.run.parts import Evaluate
from dovetail.run.report import Reporter
from dovetail.types import (
    DataSourceCall,
    EvalOutput,
    Group,
    RolloutCall,
    RolloutOutput,
    Sample,
)
from dovetail.types.ports import DataSource

if TYPE_CHECKING:
    from dovetail.run.build import Parts

R = TypeVar("R")


def make_source(parts: Parts) -> DataSource | None:
    """Prompts, or under SFT finished samples: the user's source, or the built-in one. None where
    nothing gives prompts: evaluation alone needs none."""
    config = parts.config
    default = functools.partial(
        build_source,
        config.data,
        config.rollout.n_samples_per_prompt,
        parts.models.reader,
        parts.max_prompt_len,
        buffer_filter=parts.hooks.get("buffer_filter"),
        sft=config.is_sft,
    )
    hook = parts.hooks.get("data_source")
    if hook is not None:
        call = DataSourceCall(
            args=parts.args,
            default=default,
            tokenizer=parts.models.tokenizer,
            config=config.data,
            processor=parts.models.processor,
        )
        source: DataSource = hook(call)
        return source
    if config.data.prompt_data is not None:
        return default()
    # A rollout function may bring its prompts; the family's source gives it empty samples.
    by_function = "rollout_function" in parts.hooks
    return RolloutDataSourceWithBuffer(parts.args) if by_function else None


def make_collecting(parts: Parts, reporter: Reporter, num_steps: int) -> Collecting:
    """What gives the samples of each step."""
    config = parts.config
    if parts.replay is not None:
        return Collecting(_taught(parts.replay, parts), None, config.observe.trace)
    assert parts.source is not None
    hook = parts.hooks.get("rollout_function")
    if hook is not None and config.collects_ahead and hook.path in STREAMS:
        hook = None  # It is what the run does by itself.
    default, stream = _make_default(parts, reporter, hook is None)
    if hook is not None:
        default = _collect_by(parts, hook, default)
    trains_as_it_is = not (
        config.debug.debug_rollout_only or "custom_convert_samples_to_train_data" in parts.hooks
    )
    collect = _taught(_checking(default, hook) if trains_as_it_is else default, parts)
    if not config.collects_ahead:
        return Collecting(collect, parts.source, config.observe.trace)
    return CollectingAhead(
        collect,
        parts.source,
        num_steps=num_steps,
        max_lag=config.rollout.max_lag,
        stream=stream,
        keeps_stale=config.rollout.async_unused_samples_handler == "keep",
        group_size=config.rollout.n_samples_per_prompt,
        trace=config.observe.trace,
    )


def _make_default(
    parts: Parts, reporter: Reporter, alone: bool
) -> tuple[Collect, StreamRollout | None]:
    """The built-in rollout; `alone`: nothing of the user's calls it."""
    config = parts.config
    assert parts.source is not None
    if config.is_sft:
        return SftRollout(parts.source, config.rollout.rollout_batch_size), None
    if not (alone and config.collects_ahead):
        return _make_rollout(parts, reporter, Rollout), None
    hook = parts.hooks.get("custom_async_data_buffer")
    make = None if hook is None else lambda handler: hook(BufferInput(parts.args, handler))
    stream = _make_rollout(parts, reporter, functools.partial(StreamRollout, make_buffer=make))
    return stream, stream


def _taught(collect: Collect, parts: Parts) -> Collect:
    """With the logprobs of a teacher's servers on every sample that came without."""
    teacher = parts.teacher
    if teacher is None:
        return collect

    async def taught(rollout_id: int) -> RolloutOutput:
        output = await collect(rollout_id)
        await teacher.teach(sample for group in output.samples for sample in group)
        output.metrics.update(teacher.metrics())
        return output

    return taught


def _make_rollout(parts: Parts, reporter: Reporter, kind: Callable[..., R]) -> R:
    config, hooks = parts.config, parts.hooks
    assert parts.source is not None
    return kind(
        parts.engine,
        parts.models.tokenizer,
        parts.source,
        parts.scorer,
        config.rollout,
        seed=config.data.rollout_seed,
        generate=hooks.get("custom_generate_function"),
        resolve_generate=functools.partial(parts.bound, "custom_generate_function"),
        sample_hook=hooks.get("rollout_sample_hook"),
        group_filter=hooks.get("dynamic_sampling_filter"),
        sample_filter=hooks.get("rollout_sample_filter"),
        all_samples=hooks.get("rollout_all_samples_process"),
        group_rm=config.reward.group_rm,
        reward_key=config.reward.reward_key,
        reward_objects=parts.reward_objects,
        max_context_len=parts.models.context_len,
        teacher=parts.teacher,
        processor=parts.models.processor,
        return_routed_experts=config.algorithm.use_rollout_routing_replay,
        on_progress=reporter.rollout_progress,
    )


def _checking(collect: Collect, hook: BoundHook | None) -> Collect:
    async def checked(rollout_id: int) -> RolloutOutput:
        output = await collect(rollout_id)
        where = hook.spec.where if hook is not None else "generate and rollout functions"
        check_samples(output.samples, where)
        return output

    return checked


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
        resolve_generate=functools.partial(parts.bound, "custom_generate_function"),
        sample_hook=parts.hooks.get("rollout_sample_hook"),
        group_rm=parts.config.reward.group_rm,
        max_context_len=_eval_context_len(parts),
        processor=parts.models.processor,
        log_passrate=parts.config.observe.log_passrate,
        vote=_voter(parts),
        on_progress=reporter.eval_progress,
    )
    return default if hook is None else _evaluate_by(parts, hook, default)


def _voter(parts: Parts) -> Vote:
    custom, rm_type = "custom_rm" in parts.hooks, parts.config.reward.rm_type
    return lambda sample: vote_of(sample, rm_type, custom)


def _eval_context_len(parts: Parts) -> int:
    own = parts.config.eval.eval_max_context_len
    return min(parts.models.context_len, own or parts.models.context_len)


def _collect_by(parts: Parts, hook: BoundHook, default: Collect) -> Collect:
    """The user's rollout function. What it did not measure of its samples is added."""

    async def collect(rollout_id: int) -> RolloutOutput:
        output: RolloutOutput = await hook(_rollout_call(parts, rollout_id, default))
        measured = sample_metrics(output.samples, parts.config.reward.reward_key)
        output.metrics = {**measured, **output.metrics}
        return output

    return collect


def _evaluate_by(parts: Parts, hook: BoundHook, default: Evaluate) -> Evaluate:
    """The user's evaluation function. What it did not measure of its samples is added."""
    reward = parts.config.reward
    reward_key = reward.eval_reward_key or reward.reward_key

    async def evaluate(rollout_id: int) -> EvalOutput:
        call = _rollout_call(parts, rollout_id, default, evaluation=True)
        output: EvalOutput = await hook(call)
        for name, samples in output.data.items():
            if not samples:
                continue
            measured = sample_metrics([samples], reward_key, prefix=f"eval/{name}")
            if f"eval/{name}/reward" in measured:
                measured |= _statistics(parts, name, samples)
            output.metrics = {**measured, **output.metrics}
            known = output.columns.get(name, {})
            output.columns[name] = {**columns(samples, reward_key), **known}
        return output

    return evaluate


def _statistics(parts: Parts, name: str, samples: list[Sample]) -> dict[str, float]:
    """As the built-in evaluation has them, if the samples know which prompt they answer."""
    if any(sample.group_index is None for sample in samples):
        return {}
    groups: dict[int, Group] = {}
    for sample in samples:
        groups.setdefault(int(sample.group_index or 0), []).append(sample)
    own, reward = parts.config.eval, parts.config.reward
    named = next((one for one in parts.eval_sets if one.name == name), None)
    reading = Reading(
        reward.eval_reward_key or reward.reward_key if named is None else named.reward_key,
        own.eval_pass_threshold if named is None else named.pass_threshold,
        tuple(own.eval_pass_k) if named is None else named.pass_k,
        parts.config.observe.log_passrate,
        _voter(parts),
    )
    return set_metrics(name, list(groups.values()), reading)


def _rollout_call(
    parts: Parts,
    rollout_id: int,
    default: Callable[[int], Awaitable[Any]],
    evaluation: bool = False,
) -> RolloutCall:
    """The parts that the default function uses."""
    return RolloutCall(
        rollout_id,
        evaluation=evaluation,
        data_source=parts.source,
        engine=parts.engine if parts.samples else None,
        tokenizer=parts.models.tokenizer,
        scorer=parts.scorer if parts.samples else None,
        default=default,
        weight_version=rollout_id,
        processor=parts.models.processor,
    )
