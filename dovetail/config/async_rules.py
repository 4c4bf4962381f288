"""Generation during training (max_lag above 0): what can't be, what has no effect, and the
correction that it brings along. As in `dovetail.config.check` and `dovetail.config.notes`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig

STREAMS = frozenset(
    {
        "slime.rollout.fully_async_rollout.generate_rollout_fully_async",
        "vime.rollout.fully_async_rollout.generate_rollout_fully_async",
        "miles.rollout.fully_async_rollout.generate_rollout_fully_async",
        "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn",
    }
)
"""Rollout functions of other frameworks that mean the one of a run with max_lag."""
_ONLY_AHEAD = (
    "async_max_concurrent_samples",
    "async_data_buffer_capacity_factor",
    "async_unused_samples_handler",
)
_CHOICES = ("use_tis", "use_rollout_logprobs", "use_decoupled_loss")
"""What a user may have chosen to do about tokens of older weights."""


def async_rules(config: RunConfig) -> Iterator[str]:
    """Ways of generating ahead that can't be."""
    lag, interval = config.rollout.max_lag, config.rollout.update_weights_interval
    if lag and config.is_sft:
        yield (
            f"max_lag {lag} lets generation go on during training, and loss_type 'sft_loss' "
            f"generates nothing; {cure('max_lag', 0)}"
        )
    mode = config.runtime.mode
    if lag and mode == "colocated":
        yield (
            f"max_lag {lag} needs engines that generate while the trainer trains, and under mode "
            f"'colocated' they take turns on the same devices; {cure('max_lag', 0)}, or "
            f"{cure('mode', 'disaggregated')}"
        )
    rests = config.runtime.trainer_rests or config.runtime.engines_rest
    if lag and mode == "disaggregated" and rests:
        leaf = "offload_train" if config.runtime.trainer_rests else "offload_rollout"
        yield (
            f"max_lag {lag} has trainer and engines work at the same time, and {leaf} lets one of "
            f"them rest; {cure(leaf, False)}, or {cure('max_lag', 0)}"
        )
    if interval > lag + 1:
        yield (
            f"update_weights_interval {interval} trains tokens that are {interval - 1} steps old, "
            f"max_lag allows {lag}; {cure('max_lag', interval - 1)}, or "
            f"{cure('update_weights_interval', lag + 1)}"
        )
    path = config.hooks.custom_async_data_buffer_path
    if path is not None and not lag and config.hooks.rollout_function_path is None:
        yield (
            f"custom_async_data_buffer_path '{path}' is never called: nothing is made ahead; "
            f"{cure('max_lag', 1)}"
        )


def async_notes(config: RunConfig) -> Iterator[str]:
    """One line for each setting of it without effect, and for what it brings along."""
    rollout, engine = config.rollout, config.engine
    if not config.collects_ahead:
        given = [leaf for leaf in _ONLY_AHEAD if leaf in rollout.model_fields_set]
        if given and config.hooks.rollout_function_path is None:
            yield f"{', '.join(given)} does nothing without {cure('max_lag', 1)}"
        if rollout.max_lag and not config.is_sft:
            yield f"max_lag {rollout.max_lag} does nothing: this run does not sample and train"
        return
    if rollout.partial_rollout:
        yield (
            "partial_rollout does nothing more: under max_lag above 0 what a step does not need "
            "is the next one's"
        )
    if config.runtime.mode == "local" and not engine.in_processes:
        yield (
            f"max_lag {rollout.max_lag}: the embedded engine has a copy of the weights, and a "
            "thread (on a GPU a process) of its own; give it processes with --rollout-num-engines"
        )


def implied_correction(config: RunConfig, chosen: Collection[str]) -> str | None:
    """Why use_tis is on though nobody asked for it; None: it is not.

    Args:
        chosen: the settings that were given.
    """
    own = config.algorithm
    if not config.collects_ahead or own.loss_type != "policy_loss":
        return None
    if any(leaf in chosen for leaf in _CHOICES):
        return None
    return (
        f"max_lag {config.rollout.max_lag} trains tokens of older weights: use_tis is on "
        f"(truncated importance sampling, tis_clip {own.tis_clip}); {cure('use_tis', False)} "
        "to do without"
    )
