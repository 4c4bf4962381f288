"""Settings that are fine but do nothing in this run: told once, never an error."""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.config.agent_rules import agent_notes
from dovetail.config.async_rules import async_notes
from dovetail.config.engine_rules import engine_notes
from dovetail.config.eval_sets import eval_sets
from dovetail.config.leaves import cure
from dovetail.config.placement_rules import placement_notes
from dovetail.config.resolve import Resolved
from dovetail.config.reward_rules import settings_without_reward
from dovetail.config.run import RunConfig
from dovetail.config.training_rules import GROUPED


def notes(config: RunConfig) -> list[str]:
    """One line for each setting without effect."""
    parts = (
        _of_data,
        _of_evaluation,
        _of_rewards,
        _of_training,
        _of_the_teacher,
        _of_the_algorithm,
        engine_notes,
        agent_notes,
        placement_notes,
        async_notes,
    )
    return [note for part in parts for note in part(config)]


def _of_data(config: RunConfig) -> Iterator[str]:
    data, rollout = config.data, config.rollout
    over = rollout.over_sampling_batch_size
    if data.num_rollout is not None and data.num_epoch is not None:
        yield f"num_epoch {data.num_epoch} is ignored: num_rollout {data.num_rollout} is set"
    if data.apply_chat_template_kwargs and not data.apply_chat_template:
        yield "apply_chat_template_kwargs does nothing without --apply-chat-template"
    if rollout.partial_rollout and (over is None or over == rollout.rollout_batch_size):
        hook = config.hooks.dynamic_sampling_filter_path
        if hook is None:
            yield (
                "partial_rollout keeps the surplus of a step, but nothing is surplus: "
                "over_sampling_batch_size is not above rollout_batch_size"
            )


def _of_evaluation(config: RunConfig) -> Iterator[str]:
    hooks, sets = config.hooks, eval_sets(config)
    given = sorted(config.eval.model_fields_set)
    if config.eval.eval_interval is None and sets:
        yield "the evaluation sets are not used: --eval-interval is not set"
    elif given and not (sets or hooks.eval_function_path or hooks.rollout_function_path):
        yield f"{', '.join(given)} does nothing: there is no evaluation set (--eval-prompt-data)"
    yield from evaluation_notes(config)


def evaluation_notes(config: RunConfig) -> Iterator[str]:
    """Of an evaluation, in a run or alone: one line for each setting without effect."""
    own = config.eval
    if own.eval_config is not None and own.eval_prompt_data:
        yield "eval_prompt_data is ignored: --eval-config names the sets"
    for one in eval_sets(config):
        if one.n_samples_per_eval_prompt > 1 and one.temperature == 0:
            yield (
                f"temperature 0 is greedy: all {one.n_samples_per_eval_prompt} samples of a prompt "
                f"of evaluation set '{one.name}' will be the same"
            )
    if not config.observe.log_passrate and (own.eval_pass_k or own.eval_pass_threshold is not None):
        yield "eval_pass_k and eval_pass_threshold do nothing with --no-log-passrate"


SERVER_HOOKS = {
    "router_middleware_paths",
    "sglang_custom_pull_weights_pre_read_hook",
    "session_message_matcher",
    "session_sample_picker_path",
    "session_sample_postprocessor_path",
    "compat_imports",
}
"""Settings of functions that a server calls, and how they are loaded."""
SERVING_READS: dict[str, set[str] | None] = {
    "model": None,
    "engine": None,
    "router": None,
    "session": None,
    "runtime": None,
    "hooks": SERVER_HOOKS,
    "checkpoint": {"load"},
    "observe": {"run_dir", "run_name"},
    "rollout": {"rollout_max_context_len"},
}
"""Sections and settings that `dovetail serve` reads; None: all of the section."""


def serving_notes(resolved: Resolved) -> Iterator[str]:
    """Of a server without training: what was given on the command line and has no effect. Files
    may be those of a run, which has more settings than a server."""
    config = resolved.config
    idle: list[str] = []
    for section in sorted(config.model_fields_set):
        known = SERVING_READS.get(section, set())
        if known is not None:
            idle += sorted(getattr(config, section).model_fields_set - known)
    told = [leaf for leaf in idle if resolved.origins[leaf].startswith("flag ")]
    if told:
        yield f"without effect in a server: {', '.join(told)}"


def _of_rewards(config: RunConfig) -> Iterator[str]:
    yield from settings_without_reward(config)
    if config.hooks.custom_rm_path is None:
        return
    sets = [one.name for one in eval_sets(config) if one.rm_type and not one.custom_rm_path]
    named = [f"of evaluation set '{name}' " for name in sets]
    for whose in ([""] if config.reward.rm_type else []) + named:
        yield f"rm_type {whose}does nothing: the run's --custom-rm-path goes first"


def _of_the_teacher(config: RunConfig) -> Iterator[str]:
    own, temperature = config.distillation, config.rollout.rollout_temperature
    asked = bool(own.opd_teacher_urls)
    if config.has_teacher and asked and temperature != 1.0:
        yield (
            f"the policy's logprobs are under rollout_temperature {temperature}, a teacher's "
            "server gives its own under temperature 1: even equal models differ"
        )
    if not config.has_teacher:
        return
    used = {
        "opd_teacher_model": asked and own.form == "vllm",
        "opd_teacher_token_env": asked,
        "opd_teacher_timeout_s": asked,
        "opd_teacher_retries": asked,
        "opd_teacher_concurrency": asked,
    }
    for leaf, is_used in used.items():
        if leaf in own.model_fields_set and not is_used:
            yield f"{leaf} {getattr(own, leaf)} does nothing: no server of that form is asked"


def _of_training(config: RunConfig) -> Iterator[str]:
    algorithm, optimizer = config.algorithm, config.optimizer
    if config.is_sft and config.rollout.n_samples_per_prompt > 1:
        yield "sft_loss trains each row n_samples_per_prompt times over: all copies are the same"
    if config.model.ref_load and not (algorithm.use_kl_loss or algorithm.kl_coef > 0):
        yield "ref_load is not loaded: there is no KL (--use-kl-loss or --kl-coef)"
    if optimizer.lr_decay_style == "constant" and optimizer.min_lr > 0:
        yield "min_lr does nothing with --lr-decay-style constant"
    if _scores_nothing_twice(config):
        yield (
            "use_routing_replay replays nothing: with one optimizer step per rollout each sample "
            "is computed once, in the pass that trains it"
        )
    if config.debug.debug_rollout_only and config.checkpoint.save_interval is not None:
        yield "save_interval does nothing: debug_rollout_only changes no weights"


def _scores_nothing_twice(config: RunConfig) -> bool:
    """Whether use_routing_replay is on and no old logprob is computed in a pass of its own."""
    own, hooks = config.algorithm, config.hooks
    return (
        own.use_routing_replay
        and not own.use_rollout_routing_replay
        and config.samples_per_optimizer_step >= config.samples_per_rollout
        and not (own.kl_coef or own.use_opd or own.loss_type == "custom_loss")
        and own.advantage_estimator != "on_policy_distillation"
        and hooks.custom_advantage_function_path is None
        and hooks.rollout_data_postprocess_path is None
        and not config.model.gradient_checkpointing
    )


_DISCOUNTED = ("ppo", "reinforce_plus_plus")
_OF_ADVANTAGES = (
    "gamma",
    "lambd",
    "grpo_std_normalization",
    "rewards_normalization",
    "normalize_advantages",
    "eps_clip",
    "eps_clip_high",
    "eps_clip_c",
    "use_kl_loss",
    "kl_loss_coef",
    "kl_loss_type",
    "kl_coef",
    "entropy_coef",
    "use_opd",
    "use_rollout_logprobs",
)
"""Settings of losses that read advantages."""


_SWITCHES = {
    **dict.fromkeys(("tis_clip", "tis_clip_low", "tis_scope", "tis_outside"), "use_tis"),
    **dict.fromkeys(("rejection_scope", "veto_threshold"), "use_tis"),
    "rejection_clip": "rejection_scope",
    "rejection_clip_low": "rejection_scope",
    "behav_imp_weight_cap": "use_decoupled_loss",
    "opsm_delta": "use_opsm",
    "use_unbiased_kl": "use_kl_loss",
}
"""Settings that one other setting brings into play."""


def _of_the_algorithm(config: RunConfig) -> Iterator[str]:
    own, estimator = config.algorithm, config.algorithm.advantage_estimator
    distils = own.loss_type == "distillation_loss"
    measured = own.use_tis or own.get_mismatch_metrics
    built_in = measured and config.hooks.custom_tis_function_path is None
    used = {
        "gamma": estimator in _DISCOUNTED,
        "lambd": estimator == "ppo",
        "grpo_std_normalization": estimator in ("grpo", "gspo", "cispo"),
        "rewards_normalization": estimator in GROUPED,
        "loss_divisor": own.reduction == "constant",
        "eps_clip_c": own.objective != "cispo",
        "tis_clip": measured,
        "tis_clip_low": measured,
        "tis_scope": built_in,
        "tis_outside": built_in,
        "rejection_scope": built_in,
        "rejection_clip": built_in and own.rejection_scope is not None,
        "rejection_clip_low": built_in and own.rejection_scope is not None,
        "veto_threshold": built_in,
        "behav_imp_weight_cap": own.use_decoupled_loss,
        "opsm_delta": own.use_opsm,
        "opd_kl_coef": own.use_opd or estimator == "on_policy_distillation",
        "use_unbiased_kl": own.use_kl_loss,
        "kl_coef": estimator != "on_policy_distillation",
        "kl_loss_type": own.use_kl_loss or own.kl_coef > 0,
        "calculate_per_token_loss": own.loss_reduction is None,
        "distillation_beta": distils,
        "distillation_top_k": distils,
    }
    under = f"advantage_estimator '{estimator}'"
    if not own.estimates:
        used = {**used, **dict.fromkeys(_OF_ADVANTAGES, False)}
        under = f"loss_type '{own.loss_type}'"
    for leaf, is_used in used.items():
        if leaf in own.model_fields_set and not is_used:
            switch = _SWITCHES.get(leaf)
            why = f"without {cure(switch)}" if switch and not getattr(own, switch) else ""
            yield (
                f"{leaf} {getattr(own, leaf)} changes nothing "
                f"{why or f'under {under} and the other settings of this run'}"
            )
    if "value_clip" in config.critic.model_fields_set and not config.has_critic:
        yield f"value_clip {config.critic.value_clip} changes nothing: there is no critic"
