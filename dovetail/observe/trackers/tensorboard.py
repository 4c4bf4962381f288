"""Metrics as TensorBoard events, written by the tensorboard package itself, without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dovetail.types.errors import MissingExtraError

if TYPE_CHECKING:
    from dovetail.observe.tracker import TrackerSetup


class TensorBoardTracker:
    """One scalar per metric and step below `tensorboard/` of the run directory."""

    def __init__(self, setup: TrackerSetup) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise MissingExtraError(
                "TensorBoard is not installed: pip install tensorboard, "
                "or --no-use-tensorboard (TOML: observe.use_tensorboard)"
            ) from error
        self._events, self._summaries = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(setup.run_dir.tensorboard), flush_secs=10)
        if setup.resumed_after is not None:
            # Tells TensorBoard to hide what an abandoned future logged from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            step = setup.resumed_after + 1
            self._writer.add_event(
                event_pb2.Event(wall_time=time.time(), step=step, session_log=start)
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue one event; a thread writes it."""
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
        ]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(
            self._events.Event(wall_time=time.time(), step=step, summary=summary)
        )

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()
