"""Generation during training with the trainer's ranks and an engine on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loop.same import assert_every_step_once
from tests.loop.test_async import STEPS, Task, assert_accounted, assert_bound
from tests.loop.tiny import read_metrics
from tests.on_ray import nothing_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RANKS = ("--mode", "disaggregated", "--actor-num-gpus-per-node", 2, "--rollout-num-engines", 1)
LAGS = ("--max-lag", 1, "--save-interval", 2, "--async-save")


def test_ranks_train_while_engines_generate_within_the_bound_and_a_resume_loses_nothing(
    tmp_path: Path,
) -> None:
    task = Task(tmp_path)
    filtered = ("--dynamic-sampling-filter-path", task.hook("keep"))
    given = (*RANKS, *LAGS, *filtered)
    with nothing_left():
        assert task.train("ray", *given, "--num-rollout", STEPS // 2) == 0
    assert_bound(tmp_path / "ray", 1)
    assert_accounted(tmp_path / "ray")
    with nothing_left():
        assert task.train("ray", *given, load=True) == 0
    assert_every_step_once(tmp_path / "ray", STEPS)
    lags = assert_bound(tmp_path / "ray", 1)
    assert lags[1] > 0, "some were made ahead"
    assert_accounted(tmp_path / "ray")
    assert all("train/tis" in row for row in read_metrics(tmp_path / "ray") if "train/loss" in row)
