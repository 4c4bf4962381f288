"""Metrics as JSON lines in the run directory: the record that everything else is drawn from.

Each row is one line, written at once. A row that can't be written (disk full) is kept and written
before the next one, so a run on a disk that is full for a while loses none. Values that are not
finite are null.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from dovetail.observe.atomic import write_atomic
from dovetail.observe.log import warn_once
from dovetail.observe.run_dir import RunDir
from dovetail.types.errors import DataError

if TYPE_CHECKING:
    from dovetail.observe.tracker import TrackerSetup

log = logging.getLogger(__name__)


class JsonlTracker:
    """Appends `{"step": ..., "time": <seconds since 1970>, <metric>: <number>, ...}` per call."""

    def __init__(self, setup: TrackerSetup) -> None:
        self._path = setup.run_dir.metrics
        self._pending: list[bytes] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o644)
        size = os.fstat(self._file).st_size
        if size and self._path.read_bytes()[-1:] != b"\n":
            # The last row of a killed process: what follows must not be glued to it.
            os.write(self._file, b"\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row, and those that could not be written before."""
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._pending.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        self._write_pending(last_chance=False)

    def close(self) -> None:
        """Write what is pending.

        Raises:
            OSError: it still can't be written.
        """
        if self._file < 0:
            return
        try:
            self._write_pending(last_chance=True)
        finally:
            os.close(self._file)
            self._file = -1

    def _write_pending(self, last_chance: bool) -> None:
        while self._pending:
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, self._pending[0])
                if written < len(self._pending[0]):
                    os.ftruncate(self._file, size)
                    raise OSError(28, "only part of a row fits")
            except OSError as error:
                if last_chance:
                    raise
                warn_once(log, "metrics wait in memory: %s can't be written: %s", self._path, error)
                return
            self._pending.pop(0)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a metrics file, in file order. The unfinished last row of a killed process is left
    out.

    Raises:
        DataError: the file can't be read, or another line is no row; the message has file and line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"metrics can't be read from {path}: {error.strerror}") from error
    lines = raw.split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: not a row of metrics: {error}") from error
    return rows


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps in order and the last finite value of metric `name` at each of them."""
    values = {
        row["step"]: float(row[name])
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    }
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def supersede_rows(run_dir: RunDir, done: int, evaluated: bool = True) -> Path | None:
    """Make room for a run that goes on after `done` finished steps.

    Rows of later steps are moved to `metrics.superseded-<n>.jsonl`: never lost, never counted
    twice. When the evaluation at `done` is to be run again (`evaluated` is False), rows of step
    `done` that have `eval/` metrics are moved too.

    Returns:
        The file they were moved to; None if there were none.

    Raises:
        OSError: a file can't be written; the metrics are as they were.
    """
    path = run_dir.metrics
    if not path.is_file():
        return None
    kept: list[bytes] = []
    moved: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        (kept if _stays(line, done, evaluated) else moved).append(line)
    if not moved:
        return None
    aside = run_dir.free_superseded_metrics()
    # In this order a kill in between leaves a row in both files, never in none.
    write_atomic(aside, b"".join(moved), durable=True)
    write_atomic(path, b"".join(kept), durable=True)
    return aside


def _stays(line: bytes, done: int, evaluated: bool) -> bool:
    try:
        row = _row(line)
    # A torn row: kept, but no longer among the good ones.
    except ValueError:
        return False
    if row["step"] == done and not evaluated:
        return not any(name.startswith("eval/") for name in row)
    return row["step"] <= done


def _row(line: bytes) -> dict[str, Any]:
    row = orjson.loads(line)
    if not (isinstance(row, dict) and type(row.get("step")) is int):
        raise ValueError("an object with an integer 'step' is expected")
    return row
