"""Rollout and evaluation functions, with small stand-ins for all that they are handed."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from dovetail.hooks import BoundHook, spec_of
from dovetail.hooks.adapt import adapt
from dovetail.rollout.evaluate import EvalSet, Evaluation
from dovetail.rollout.rollout import Rollout
from dovetail.rollout.sampling import rollout_sampling
from dovetail.run.rehearse.generate import engine, needs_logprobs
from dovetail.run.rehearse.samples import check_generated, prompts
from dovetail.run.rehearse.source import FewPrompts
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.tokenizers import tokenizer_of
from dovetail.run.rehearse.verdict import Fault
from dovetail.run.rehearse.world import AlternatingScorer, WrittenEngine
from dovetail.types import EvalOutput, RolloutCall, RolloutOutput

_GROUPS, _TOKENS = 2, 512


def rollout(hook: BoundHook, stage: Stage) -> None:
    """One step of few groups."""
    found, stage.made_up = prompts(stage.config, stage.missing)
    with engine(stage, found) as made:
        source = FewPrompts(stage.config, stage.missing)
        call = _call(stage, made, source, _default_rollout(stage, made, source))
        output: RolloutOutput = stage.call(hook, call)
    samples = [sample for group in output.samples for sample in group]
    if not samples:
        raise Fault("gives back groups without samples")
    replaced = stage.config.hooks.custom_convert_samples_to_train_data_path is not None
    if not replaced and not stage.config.debug.debug_rollout_only:
        for odd in check_generated(samples, "a step", needs_logprobs=needs_logprobs(stage)):
            stage.warn(odd)
        _check_rewards(samples, stage)
    _check_numbers(output.metrics)
    if _also_evaluates(hook, stage):
        spec = spec_of("eval_function")
        try:
            evaluation(replace(hook, spec=spec, native=adapt(spec, hook.invoke)), stage)
        except Fault as fault:
            raise Fault(
                f"{fault} (in evaluation, which calls it too: --eval-function-path names another)"
            ) from None


def _also_evaluates(hook: BoundHook, stage: Stage) -> bool:
    """Whether the run evaluates by this rollout function, for want of another."""
    config = stage.config
    foreign = "native" not in hook.form.families
    return foreign and config.eval.eval_interval is not None and not config.hooks.eval_function_path


def _check_rewards(samples: list[Any], stage: Stage) -> None:
    own = stage.config.hooks.custom_reward_post_process_path
    unscored = [sample for sample in samples if sample.reward is None]
    if unscored and own is None and not stage.config.is_sft:
        raise Fault(
            f"gives back {len(unscored)} of {len(samples)} samples without a reward; set "
            "sample.reward, or ask for it: await call.scorer.score(sample)"
        )


def evaluation(hook: BoundHook, stage: Stage) -> None:
    """One evaluation of one small set."""
    found, stage.made_up = prompts(stage.config, stage.missing)
    with engine(stage, found) as made:
        source = FewPrompts(stage.config, stage.missing)
        call = _call(stage, made, source, _default_evaluation(stage, made), evaluation=True)
        output: EvalOutput = stage.call(hook, call)
    if not output.data and not output.metrics:
        raise Fault("gives back no evaluation set: expected {name: {'rewards': [...], ...}}")
    _check_numbers(output.metrics)


def _check_numbers(metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise Fault(
                f"gives the metric {name!r} as {type(value).__name__} {value!r:.40}, expected a "
                "number"
            ) from None
        if math.isnan(number):
            continue


def _call(
    stage: Stage,
    made: WrittenEngine,
    source: FewPrompts,
    default: Callable[[int], Awaitable[Any]],
    evaluation: bool = False,
) -> RolloutCall:
    reward = stage.config.reward
    if reward.rm_type is None and stage.config.hooks.custom_rm_path is None:
        # Rows may name their reward themselves; made-up ones do not.
        stage.args.rm_type = "random"
    return RolloutCall(
        rollout_id=0,
        evaluation=evaluation,
        data_source=source,
        engine=made,
        tokenizer=tokenizer_of(stage.config),
        scorer=AlternatingScorer(stage.config.reward.reward_key),
        default=default,
        args=stage.args,
        weight_version=0,
    )


def _default_rollout(stage: Stage, made: WrittenEngine, source: FewPrompts) -> Rollout:
    config = stage.config
    small = {
        "rollout_batch_size": min(_GROUPS, config.rollout.rollout_batch_size),
        "over_sampling_batch_size": None,
        "rollout_max_response_len": min(_TOKENS, config.rollout.rollout_max_response_len),
    }
    return Rollout(
        made,
        tokenizer_of(config),
        source,
        AlternatingScorer(config.reward.reward_key),
        config.rollout.model_copy(update=small),
        seed=0,
        reward_key=config.reward.reward_key,
    )


def _default_evaluation(stage: Stage, made: WrittenEngine) -> Evaluation:
    found, _ = prompts(stage.config, stage.missing)
    reward = stage.config.reward
    sampling = rollout_sampling(stage.config.rollout)
    key = reward.eval_reward_key or reward.reward_key
    one = EvalSet("rehearsal", found[:_GROUPS], sampling=sampling, reward_key=key)
    return Evaluation(made, tokenizer_of(stage.config), [one], AlternatingScorer(key), seed=0)
