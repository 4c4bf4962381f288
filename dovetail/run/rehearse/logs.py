"""Functions that log a step or an evaluation."""

from __future__ import annotations

import math
import types
from typing import Any

from dovetail.config.eval_sets import eval_sets
from dovetail.hooks import BoundHook
from dovetail.run.rehearse.samples import groups
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.verdict import Fault, NotInRehearsal


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
    """The columns of a small set under each name that the run's sets have."""
    made, stage.made_up = groups(stage.config, stage.missing, 2)
    samples = [sample for group in made for sample in group]
    rewards = [sample.get_reward_value(stage.config.reward) for sample in samples]
    columns = {"rewards": rewards, "truncated": [False] * len(samples), "samples": samples}
    config = stage.config
    names = [one.name for one in eval_sets(config)]
    # Sets of a function of the user's own have the names that it gives them.
    own = not names or config.hooks.eval_function_path or config.hooks.rollout_function_path
    sets: dict[str, Any] = {name: dict(columns) for name in names or ("rehearsal",)}
    metrics: dict[str, Any] = {f"eval/{name}/reward": 0.5 for name in sets}
    values = {"rollout_id": 0, "data": _SomeSets(sets) if own else sets}
    values |= {"metrics": metrics, "extra_metrics": metrics}
    _check(stage.call(lambda: hook.invoke.finished(**values)), metrics, stage)


class _SomeSets(dict[str, Any]):
    """Not all sets of the run: what is missing here says nothing about the function."""

    def __missing__(self, name: object) -> Any:
        raise _NoSuchSet(f"reads the evaluation set {name!r}, which a rehearsal does not have")


class _NoSuchSet(NotInRehearsal, KeyError):
    """For functions that look for a set in vain and go on."""

    def __str__(self) -> str:
        return str(self.args[0])


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
