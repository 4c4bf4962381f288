"""What is due when: a pure function of the configuration and the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.config.run import RunConfig
from dovetail.run.replay import Replay
from dovetail.types.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Steps count from 0 (`rollout_id`); after step i, i + 1 steps are done."""

    num_steps: int
    optimizer_steps_per_step: int
    eval_interval: int | None
    eval_before: bool
    save_interval: int | None

    @property
    def total_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, for learning-rate schedules."""
        return self.num_steps * self.optimizer_steps_per_step

    def eval_due(self, done: int) -> bool:
        """Whether to evaluate when `done` steps are done: every interval, and after the last
        step.
        """
        if self.eval_interval is None:
            return False
        if done == 0:
            return self.eval_before
        return done % self.eval_interval == 0 or done == self.num_steps

    def save_due(self, done: int) -> bool:
        """Whether to save when `done` steps are done: every interval, and after the last step."""
        if self.save_interval is None or done == 0:
            return False
        return done % self.save_interval == 0 or done == self.num_steps


def make_schedule(
    config: RunConfig, prompts_per_epoch: Callable[[], int], replay: Replay | None = None
) -> Schedule:
    """The schedule of a run whose source has so many prompts, or that replays samples.

    Raises:
        ConfigError: an epoch holds less than one step, or neither num_rollout nor num_epoch is set.
    """
    data, rollout = config.data, config.rollout
    if replay is not None:
        num_steps = replay.num_steps(data.num_rollout)
    elif data.num_rollout is not None:
        num_steps = data.num_rollout
    elif data.num_epoch is not None:
        prompts = prompts_per_epoch()
        per_epoch = prompts // rollout.rollout_batch_size
        if per_epoch == 0:
            raise ConfigError(
                f"an epoch of {prompts} prompts holds no step of "
                f"{rollout.rollout_batch_size} prompts; lower --rollout-batch-size "
                "(TOML: rollout.rollout_batch_size) or set --num-rollout instead of --num-epoch"
            )
        num_steps = per_epoch * data.num_epoch
    else:
        raise ConfigError(
            "how long to run? set --num-rollout or --num-epoch (TOML: data.num_rollout)"
        )
    return Schedule(
        num_steps=num_steps,
        optimizer_steps_per_step=config.samples_per_rollout // config.samples_per_optimizer_step,
        eval_interval=config.eval.eval_interval,
        eval_before=not config.eval.skip_eval_before_train,
        save_interval=config.checkpoint.save_interval,
    )


def prompts_of(source: Any) -> int:
    """Prompts per epoch of a source: its length, else that of its `dataset`.

    Raises:
        ConfigError: it tells neither.
    """
    candidates: tuple[Any, ...] = (source, getattr(source, "dataset", None))
    for sized in candidates:
        try:
            return len(sized)
        except TypeError:
            continue
    raise ConfigError(
        f"--num-epoch needs the length of an epoch, but the source {type(source).__name__} has "
        "neither a length nor a `dataset` with one; give --num-rollout (TOML: data.num_rollout)"
    )
