"""When two runs are the same run: what they logged, sampled, saved and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dovetail.checkpoint.manager import load_checkpoint
from dovetail.observe.run_dir import RunDir
from tests.loop.tiny import read_metrics, without_times


def assert_same_run(one: Path, other: Path) -> None:
    """The run directories hold equal metrics, samples and last checkpoints, bit for bit.

    Rows of metrics less what depends on the clock; what a resumed run left behind aside counts
    only as `assert_left_behind_is_of` says.
    """
    assert without_times(read_metrics(other)) == without_times(read_metrics(one))
    assert _contents(other / "samples") == _contents(one / "samples")
    assert _contents(other / "eval") == _contents(one / "eval")
    assert _last_checkpoint(other) == _last_checkpoint(one)


def assert_left_behind_is_of(whole: Path, killed: Path) -> None:
    """What the killed run had done beyond its last checkpoint was the same too."""
    rows = without_times(read_metrics(whole))
    for path in killed.glob("metrics.superseded-*.jsonl"):
        left = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(row in rows for row in without_times(left))
    for path in killed.glob("samples/superseded-*/*.jsonl"):
        assert path.read_bytes() == (whole / "samples" / path.name).read_bytes()


def assert_every_step_once(run_dir: Path, num_steps: int) -> None:
    """Metrics and samples of each step are there exactly once, in order."""
    trained = [row["step"] for row in read_metrics(run_dir) if "train/loss" in row]
    assert trained == list(range(1, num_steps + 1))
    steps = [RunDir(run_dir).samples(step).name for step in trained]
    assert sorted(path.name for path in (run_dir / "samples").glob("*.jsonl")) == steps


def sample_indices(run_dir: Path) -> list[int]:
    """Index of every sample that was trained on, step by step."""
    paths = sorted((run_dir / "samples").glob("step_*.jsonl"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["index"] for line in lines]


def losses(run_dir: Path) -> list[float]:
    """Of every step that trained."""
    return [row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row]


def source_state(run_dir: Path) -> dict[str, Any]:
    """The data source in the newest checkpoint."""
    return dict(load_checkpoint(run_dir / "checkpoints").part("source")[1])


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def _last_checkpoint(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return {path.name: path.read_bytes() for path in sorted(newest.iterdir())}
