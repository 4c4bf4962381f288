"""The training side of a run: samples to rows, and the trainer, with the user's functions in their
places."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dovetail.batch.convert import rows_from_samples
from dovetail.run.report import Reporter
from dovetail.run.schedule import Schedule
from dovetail.trainers.trainer import Trainer

if TYPE_CHECKING:
    from dovetail.run.build import Parts


def make_trainer(parts: Parts, schedule: Schedule, reporter: Reporter) -> Trainer | None:
    """What changes the policy; None under --debug-rollout-only."""
    config = parts.config
    if config.debug.debug_rollout_only:
        return None
    return Trainer(
        parts.models.model,
        parts.models.reference,
        config.algorithm,
        config.batch,
        config.optimizer,
        temperature=1.0 if config.is_sft else config.rollout.rollout_temperature,
        pad_token_id=parts.models.tokenizer.pad_token_id or 0,
        total_optimizer_steps=schedule.total_optimizer_steps,
        samples_per_optimizer_step=config.samples_per_optimizer_step,
        report=reporter.train_progress,
    )


def make_to_rows(parts: Parts) -> Callable[..., list[Any]]:
    """From samples to rows of the training batch."""
    return functools.partial(
        rows_from_samples,
        reward_key=parts.config.reward.reward_key,
        needs_reward=not parts.config.is_sft,
        post_process=parts.hooks.get("custom_reward_post_process"),
        convert=parts.hooks.get("custom_convert_samples_to_train_data"),
    )
