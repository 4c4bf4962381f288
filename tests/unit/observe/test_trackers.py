"""Trackers: rows are never lost or doubled, and one that is down does not stop the run."""

import errno
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dovetail.observe import tracker as tracker_module
from dovetail.observe.log import open_log
from dovetail.observe.run_dir import RunDir
from dovetail.observe.tracker import (
    TRACKERS,
    Trackers,
    TrackerSetup,
    open_trackers,
    tracker_names,
)
from dovetail.observe.trackers.jsonl import JsonlTracker, read_metrics, series, supersede_rows
from dovetail.types.errors import ConfigError, DataError, MissingExtraError
from dovetail.types.ports import Tracker


@pytest.fixture
def setup(tmp_path) -> TrackerSetup:
    return TrackerSetup(RunDir.create("r", tmp_path / "run"), "r", {"lr": 0.1})


@pytest.fixture(autouse=True)
def fresh_log():
    with open_log(None):
        yield


class FakeWandbRun:
    def __init__(self, **options):
        self.options, self.rows, self.finished = options, [], False
        self.id = options["id"] or "new-id"

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    module = ModuleType("wandb")
    module.runs = []

    def init(**options):
        module.runs.append(FakeWandbRun(**options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("name", [row.name for row in TRACKERS])
def test_every_tracker_of_the_table_opens_logs_and_closes(setup, fake_wandb, name, capfd):
    trackers = open_trackers([name], setup)
    assert trackers.active == [name]
    assert isinstance(trackers._active[name], Tracker)
    trackers.log({"a": 1.0, "b": float("nan")}, 1)
    trackers.log({"a": 2}, 2)
    assert trackers.active == [name]
    trackers.close()
    trackers.close()
    assert capfd.readouterr() == ("", "")


def test_rows_are_on_disk_as_soon_as_they_are_logged(setup):
    tracker = JsonlTracker(setup)
    tracker.log({"a": 1.5, "bad": float("inf")}, 1)
    (row,) = read_metrics(setup.run_dir.metrics)
    assert (row["step"], row["a"], row["bad"]) == (1, 1.5, None)
    tracker.log({"a": 2.5}, 2)
    assert series(read_metrics(setup.run_dir.metrics), "a") == ([1, 2], [1.5, 2.5])
    assert series(read_metrics(setup.run_dir.metrics), "bad") == ([], [])
    tracker.close()


def test_rows_wait_in_memory_while_the_disk_is_full_and_none_is_lost(setup, monkeypatch, capfd):
    tracker = JsonlTracker(setup)
    tracker.log({"a": 1}, 1)
    real_write, failures = os.write, []

    def full(handle, data):
        failures.append(data)
        if len(failures) % 2:
            return real_write(handle, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for step in (2, 3, 4):
        tracker.log({"a": step}, step)
    monkeypatch.undo()
    assert len(failures) == 3
    assert capfd.readouterr().err.count("metrics wait in memory") == 1
    assert [r["step"] for r in read_metrics(setup.run_dir.metrics)] == [1]
    tracker.log({"a": 5}, 5)
    tracker.close()
    assert [r["step"] for r in read_metrics(setup.run_dir.metrics)] == [1, 2, 3, 4, 5]


def test_resuming_moves_later_rows_aside_and_doubles_none(setup):
    run = setup.run_dir
    tracker = JsonlTracker(setup)
    for step in range(5):
        tracker.log({"eval/x/reward": 0.5} if step == 0 else {"a": step}, step)
    tracker.log({"eval/x/reward": 0.7}, 3)
    tracker.close()
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 5, "a"')
    before = run.metrics.read_bytes().splitlines()
    aside = supersede_rows(run, 3)
    assert aside.name == "metrics.superseded-1.jsonl"
    assert [r["step"] for r in read_metrics(run.metrics)] == [0, 1, 2, 3, 3]
    both = run.metrics.read_bytes().splitlines() + aside.read_bytes().splitlines()
    assert sorted(both) == sorted(before)
    assert supersede_rows(run, 3) is None
    assert supersede_rows(run, 3, evaluated=False).name == "metrics.superseded-2.jsonl"
    assert [r["step"] for r in read_metrics(run.metrics)] == [0, 1, 2, 3]
    assert supersede_rows(RunDir(run.path / "none"), 3) is None


def test_a_row_cut_off_by_a_kill_is_ignored_and_not_glued_to_the_next(setup):
    path = setup.run_dir.metrics
    path.write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert [r["step"] for r in read_metrics(path)] == [1]
    supersede_rows(setup.run_dir, 1)
    tracker = JsonlTracker(setup)
    tracker.log({"a": 2}, 2)
    tracker.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", [b"nope", b"[]", b"{}", b'{"step": "1"}', b"\xff"])
def test_a_malformed_row_is_named_by_file_and_line(setup, line):
    setup.run_dir.metrics.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row"):
        read_metrics(setup.run_dir.metrics)


def test_missing_metrics_are_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="can't be read from"):
        read_metrics(tmp_path / "none")


def test_tensorboard_events_read_back_with_a_purge_at_the_resume_step(setup):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = open_trackers(["tensorboard"], setup)
    for step in (1, 2, 3):
        first.log({"rollout/reward": step / 10}, step)
    first.close()
    resumed = TrackerSetup(setup.run_dir, "r", resumed_after=1)
    again = open_trackers(["tensorboard"], resumed)
    again.log({"rollout/reward": 9.0}, 2)
    again.close()
    events = EventAccumulator(str(setup.run_dir.tensorboard)).Reload().Scalars("rollout/reward")
    assert [(e.step, round(e.value, 3)) for e in events] == [(1, 0.1), (2, 9.0)]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(setup, fake_wandb):
    open_trackers(["wandb"], setup).close()
    trackers = open_trackers(["wandb"], setup)
    trackers.log({"a": 1.0}, 7)
    trackers.close()
    first, second = fake_wandb.runs
    assert first.options["id"] is None and second.options["id"] == "new-id"
    assert second.rows == [{"a": 1.0, "step": 7}] and second.finished
    assert second.options["project"] == "dovetail" and second.options["config"] == {"lr": 0.1}


def test_a_missing_package_says_which_extra_to_install(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"dovetail-rl\[wandb\].*--no-use-wandb"):
        open_trackers(["jsonl", "wandb"], setup)


class Broken:
    def __init__(self, setup=None):
        self.calls = 0

    def log(self, metrics, step):
        self.calls += 1
        raise ConnectionError("server down")

    def close(self):
        raise RuntimeError("closing too")


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(setup, capfd):
    broken, jsonl = Broken(), JsonlTracker(setup)
    trackers = Trackers({"broken": broken, "jsonl": jsonl})
    for step in (1, 2, 3):
        trackers.log({"a": 1}, step)
    trackers.close()
    assert broken.calls == 1
    assert capfd.readouterr().err == (
        "warning: tracker broken failed and is off from now on: ConnectionError: server down\n"
    )
    assert len(read_metrics(setup.run_dir.metrics)) == 3


def entry(name: str, load) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=f"pkg:{name}", load=load)


def test_installed_entry_points_are_trackers_too(setup, monkeypatch, capfd):
    def missing():
        raise ImportError("No module named 'pkg'")

    def refusing(setup):
        raise TimeoutError("no answer")

    found = [
        entry("mine", lambda: Broken),
        entry("gone", missing),
        entry("down", lambda: refusing),
    ]
    monkeypatch.setattr(tracker_module, "_entry_points", lambda: found)
    assert tracker_names() == ["jsonl", "tensorboard", "wandb", "down", "gone", "mine"]
    assert open_trackers(["mine", "down"], setup).active == ["mine"]
    assert "tracker down can't start and is off: TimeoutError" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="can't be imported"):
        open_trackers(["gone"], setup)


def test_an_unknown_tracker_is_an_error_with_the_nearest_name(setup):
    with pytest.raises(ConfigError, match=r"did you mean 'tensorboard'\?.*jsonl"):
        open_trackers(["tensorbord"], setup)
