"""Functions that log a step or an evaluation."""

from __future__ import annotations

import math
import types
from typing import Any

from dovetail.hooks import BoundHook
from dovetail.run.rehearse.samples import groups
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.verdict import Fault


def rollout_log(hook: BoundHook, stage: Stage) -> None:
    """The samples of a small step and a few metrics."""
    made, stage.made_up = groups(stage.config, stage.missing, 2)
    samples = [sample for group in made for sample in group]
    metrics: dict[str, Any] = {"rollout/reward": 0.5, "rollout/response_length": 12.0}
    # Not by its native form, which makes true or false of anything.
    values = {"rollout_id": 0, "samples": samples, "metrics": metrics, "time_s": 1.5}
    values |= {"rollout_extra_metrics": metrics, "rollout_time": 1.5}
    _check(stage.call(lambda: hook.invoke.finished(**values)), metrics, stage)


def eval_log(hook: BoundHook, stage: Stage) -> None:
    """The columns of one small set."""
    made, stage.made_up = groups(stage.config, stage.missing, 2)
    samples = [sample for group in made for sample in group]
    rewards = [sample.get_reward_value(stage.config.reward) for sample in samples]
    columns = {"rewards": rewards, "truncated": [False] * len(samples), "samples": samples}
    metrics: dict[str, Any] = {"eval/rehearsal/reward": 0.5}
    values = {"rollout_id": 0, "data": {"rehearsal": columns}}
    values |= {"metrics": metrics, "extra_metrics": metrics}
    _check(stage.call(lambda: hook.invoke.finished(**values)), metrics, stage)


def _check(got: Any, metrics: dict[str, Any], stage: Stage) -> None:
    if not isinstance(got, bool | int | types.NoneType):
        raise Fault(
            f"returns a {type(got).__name__} ({got!r:.60}), expected true to leave the built-in "
            "metrics out, false or None to keep them"
        )
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise Fault(
                f"sets the metric {name!r} to a {type(value).__name__} ({value!r:.40}), expected "
                "a number"
            ) from None
        if not math.isfinite(number):
            stage.warn(f"sets the metric {name!r} to {number}")
    if got:
        stage.warn("returns true: the built-in metrics are left out")
