"""Metrics as TensorBoard events, written by the tensorboard package itself, without torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dovetail.types.errors import MissingExtraError

if TYPE_CHECKING:
    from dovetail.observe.tracker import TrackerSetup


class TensorBoardTracker:
    """One scalar per metric and step below `tensorboard/` of the run directory."""

    def __init__(self, setup: TrackerSetup) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise MissingExtraError(
                "TensorBoard is not installed: pip install tensorboard, "
                "or --no-use-tensorboard (TOML: observe.use_tensorboard)"
            ) from error
        self._events, self._summaries = event_pb2, summary_pb2
        directory = setup.run_dir.tensorboard
        directory.mkdir(parents=True, exist_ok=True)
        # Not tensorboard's own EventFileWriter: its thread dies with a traceback on a full disk.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._write(file_version="brain.Event:2")
        if setup.resumed_after is not None:
            # Tells TensorBoard to hide what an abandoned future logged from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=setup.resumed_after + 1, session_log=start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one event."""
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
        ]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def close(self) -> None:
        """Close the file; everything is written already."""
        self._records.close()

    def _write(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()
