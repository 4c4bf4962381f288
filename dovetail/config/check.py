"""Impossible combinations, found before a model loads or a process starts.

Each rule looks at the resolved values and yields what is wrong, with the cure by flag and TOML key.
What is only pointless is a note instead: it is shown once and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dovetail.config.agent_rules import agent_rules
from dovetail.config.async_rules import async_rules
from dovetail.config.engine_rules import engine_rules
from dovetail.config.eval_rules import evaluation, missing_data
from dovetail.config.eval_sets import eval_sets
from dovetail.config.leaves import cure, nearest
from dovetail.config.placement_rules import placement_rules
from dovetail.config.reward_rules import asked_rewards, built_in_rewards, rewards_of
from dovetail.config.router_rules import router_rules
from dovetail.config.run import RunConfig
from dovetail.config.size_rules import size_rules
from dovetail.config.training_rules import TRAINING_RULES
from dovetail.types.errors import ConfigError

_STEP_PATH = "PATH/step_{rollout_id}.jsonl"
Rule = Callable[[RunConfig], Iterator[str]]


def check(config: RunConfig) -> None:
    """Refuse a configuration that can't run.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    _refuse([problem for rule in _RULES for problem in rule(config)])


def check_evaluation(config: RunConfig) -> None:
    """Refuse a configuration that can't be evaluated once, without training.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    rules = (placement_rules, _model, evaluation, built_in_rewards, engine_rules, router_rules)
    problems = [problem for rule in rules for problem in rule(config)]
    if not (problems or config.hooks.eval_function_path or eval_sets(config)):
        problems.append(f"nothing to evaluate; name a set: {cure('eval_prompt_data', 'NAME PATH')}")
    _refuse(problems)


def check_serving(config: RunConfig) -> None:
    """Refuse a configuration that can't be served, without training.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    _refuse([problem for rule in _SERVED for problem in rule(config)])


def _refuse(problems: list[str]) -> None:
    if len(problems) > 1:
        raise ConfigError("\n- ".join([f"{len(problems)} problems in the settings:", *problems]))
    if problems:
        raise ConfigError(problems[0])


def check_names(
    config: RunConfig,
    *,
    rewards: Sequence[str],
    advantages: Sequence[str],
    losses: Sequence[str],
    engines: Sequence[str],
) -> None:
    """Refuse names that no table has; the caller knows the tables.

    Raises:
        ConfigError: with the nearest name of the table.
    """
    asked: list[tuple[str, str | None, Sequence[str], str]] = [
        ("advantage_estimator", config.algorithm.advantage_estimator, advantages, ""),
        ("loss_type", config.algorithm.loss_type, losses, ""),
        ("rollout_engine", config.engine.rollout_engine, engines, ""),
    ]
    asked += [("rm_type", row, rewards, whose) for row, whose in asked_rewards(config)]
    problems = []
    for leaf, name, names, whose in asked:
        if name is None or name in names:
            continue
        closest = nearest(name, names)
        hint = f"did you mean '{closest}'? " if closest else ""
        known = ", ".join(sorted(names))
        problems.append(f"unknown {leaf} '{name}'{whose}; {hint}known: {known}; {cure(leaf)}")
    _refuse(problems)


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.hf_checkpoint is None:
        yield f"no model; give its directory: {cure('hf_checkpoint', 'DIR')}"
    for leaf in ("hf_checkpoint", "ref_load"):
        path = getattr(model, leaf)
        if path is not None and not Path(path).is_dir() and not _looks_like_hub_name(path):
            yield (
                f"{leaf} '{path}' is not a directory; expected a Hugging Face model directory with "
                f"config.json; {cure(leaf, 'DIR')}"
            )


def _looks_like_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")


def _length_of_run(config: RunConfig) -> Iterator[str]:
    data = config.data
    if config.debug.load_debug_rollout_data is not None:
        return
    if data.num_rollout is None and data.num_epoch is None:
        yield f"how long to run? {cure('num_rollout', 100)} or {cure('num_epoch', 1)}"
    elif data.num_rollout is None and (data.prompt_data or config.hooks.data_source_path) is None:
        yield (
            "num_epoch counts passes over prompt_data, which is not set; "
            f"{cure('num_rollout', 100)}"
        )


def _data(config: RunConfig) -> Iterator[str]:
    spec = config.data.prompt_data
    if spec is None:
        hooks = config.hooks
        if not (hooks.rollout_function_path or hooks.data_source_path or config.train_only):
            yield f"no prompts; {cure('prompt_data', 'FILE.jsonl')}"
    elif not config.train_only:
        yield from missing_data("prompt_data", spec)
    if config.is_sft and config.data.label_key is None and not config.train_only:
        yield (
            "loss_type 'sft_loss' learns the response in the label column, which is not named; "
            f"{cure('label_key', 'label')}"
        )


def _rollout(config: RunConfig) -> Iterator[str]:
    rollout = config.rollout
    over = rollout.over_sampling_batch_size
    if over is not None and over < rollout.rollout_batch_size:
        yield (
            f"over_sampling_batch_size {over} is below rollout_batch_size "
            f"{rollout.rollout_batch_size}: a step could never fill; "
            f"{cure('over_sampling_batch_size', rollout.rollout_batch_size)} or more"
        )
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        yield (
            "mask_offpolicy_in_partial_rollout masks parts of resumed samples, but nothing is "
            f"resumed; add {cure('partial_rollout', True)}"
        )
    negative = [token for token in rollout.rollout_stop_token_ids if token < 0]
    if negative:
        yield (
            f"rollout_stop_token_ids has {negative}, expected token ids of at least 0; "
            f"{cure('rollout_stop_token_ids')}"
        )


def _lengths(config: RunConfig) -> Iterator[str]:
    rollout = config.rollout
    context, response = rollout.rollout_max_context_len, rollout.rollout_max_response_len
    if context is not None and response >= context:
        yield (
            f"rollout_max_response_len {response} leaves no room for a prompt in "
            f"rollout_max_context_len {context}; lower {cure('rollout_max_response_len')} or raise "
            f"{cure('rollout_max_context_len')}"
        )
    if rollout.rollout_min_new_tokens > response:
        yield (
            f"rollout_min_new_tokens {rollout.rollout_min_new_tokens} is above "
            f"rollout_max_response_len {response}; lower {cure('rollout_min_new_tokens')}"
        )


def _checkpoint(config: RunConfig) -> Iterator[str]:
    own = config.checkpoint
    if own.load is not None and not _is_own(config, own.load) and not Path(own.load).exists():
        yield (
            f"load '{own.load}' does not exist (looked from {Path.cwd()}); expected a checkpoint "
            f"or a directory of them; {cure('load', 'DIR')}"
        )
    if own.save is not None and Path(own.save).is_file():
        yield f"save '{own.save}' is a file, expected a directory; {cure('save', 'DIR')}"


def _step_template(leaf: str, path: str | None) -> Iterator[str]:
    try:
        (path or "").format(rollout_id=0)
    except (LookupError, ValueError, AttributeError, TypeError):
        yield (
            f"{leaf} '{path}' can't be filled in: braces hold nothing but the step, "
            f"{{rollout_id}}; {cure(leaf, _STEP_PATH)}"
        )


def _is_own(config: RunConfig, load: str) -> bool:
    """Whether the run saves there itself: then nothing needs to be there yet."""
    if config.checkpoint.save is not None:
        return Path(load) == Path(config.checkpoint.save)
    return config.observe.run_dir is not None and Path(load).parent == Path(config.observe.run_dir)


def _debug(config: RunConfig) -> Iterator[str]:
    debug = config.debug
    yield from _step_template("save_hf", config.checkpoint.save_hf)
    for leaf in ("save_debug_rollout_data", "load_debug_rollout_data"):
        yield from _step_template(leaf, getattr(debug, leaf))
    if debug.debug_rollout_only and config.train_only:
        which = "load_debug_rollout_data" if debug.load_debug_rollout_data else "debug_train_only"
        yield (
            f"debug_rollout_only never trains, {which} only trains; leave one of them out "
            f"({cure('debug_rollout_only', False)})"
        )
    elif debug.debug_train_only and debug.load_debug_rollout_data is None:
        yield (
            "debug_train_only has no samples to train on; "
            f"{cure('load_debug_rollout_data', _STEP_PATH)}"
        )
    path = debug.save_debug_rollout_data
    if path is not None and "{rollout_id}" not in path and config.data.num_rollout != 1:
        yield (
            f"save_debug_rollout_data '{path}' would be overwritten every step; name the step: "
            f"{cure('save_debug_rollout_data', _STEP_PATH)}"
        )


_RULES: tuple[Rule, ...] = (
    placement_rules,
    size_rules,
    _model,
    _length_of_run,
    _data,
    _rollout,
    _lengths,
    rewards_of,
    *TRAINING_RULES,
    evaluation,
    _checkpoint,
    _debug,
    engine_rules,
    router_rules,
    agent_rules,
    async_rules,
)
_SERVED: tuple[Rule, ...] = (placement_rules, _model, _checkpoint, engine_rules, router_rules)
