"""Checkpoints that ranks write while the run goes on (`async_save`).

    save due   begin: all ranks copy their state, the rest of the checkpoint is written aside
    steps      look: have all ranks written?  -> finish_save, then hash and rename in a thread
               look: is that done?            -> the run has a new checkpoint
    next save, end, signal: finish            -> waits for both
    lost rank, failing run: settle            -> committed if all is written, else dropped

One is under way at most. Until it is committed it has no manifest: a kill leaves the older ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dovetail.checkpoint.manager import Begun, CheckpointManager, Part, WritingPart
from dovetail.types import CheckpointError, DovetailError

log = logging.getLogger(__name__)

Position = tuple[int, bool]
"""Finished steps, and whether the evaluation due there is done."""


class Writers(Protocol):
    """Who writes parts in the background, as `Policy`."""

    def has_saved(self) -> bool: ...

    def finish_save(self) -> None: ...


@dataclass
class _UnderWay:
    position: Position
    begun: Begun
    export: Path | None
    writers: Writers
    committing: Future[Path] | None = None


class Saving:
    """The checkpoints of one run.

    Args:
        written: called with position, checkpoint and export of each that is there.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        written: Callable[[Position, Path, Path | None], object],
    ) -> None:
        self.manager, self._written = manager, written
        self._under_way: _UnderWay | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")

    def save(
        self, position: Position, parts: Mapping[str, Part | WritingPart], export: Path | None
    ) -> None:
        """Write a checkpoint, and wait for it.

        Raises:
            CheckpointError: as `CheckpointManager.save`.
        """
        assert self._under_way is None, "one at a time"
        path = self.manager.save(position[0], parts)
        self._written(position, path, export)

    def begin(
        self,
        position: Position,
        parts: Mapping[str, Part | WritingPart],
        export: Path | None,
        writers: Writers,
    ) -> None:
        """Begin one that `writers` go on with.

        Raises:
            CheckpointError: as `CheckpointManager.begin`.
        """
        assert self._under_way is None, "one at a time"
        begun = self.manager.begin(position[0], parts)
        self._under_way = _UnderWay(position, begun, export, writers)

    def look(self) -> None:
        """Carry on with the one under way as far as that waits for nobody.

        Raises:
            CheckpointError: it was not written, and is dropped.
            TrainerLostError: who writes it is gone; `settle` drops it.
        """
        one = self._under_way
        if one is None:
            return
        if one.committing is None and one.writers.has_saved():
            self._commit(one)
        elif one.committing is not None and one.committing.done():
            self._notice(one)

    def finish(self) -> None:
        """Wait for the one under way.

        Raises:
            CheckpointError, TrainerLostError: as `look`.
        """
        one = self._under_way
        if one is None:
            return
        if one.committing is None:
            self._commit(one)
        self._notice(one)

    def settle(self) -> None:
        """Have nothing under way, whatever became of it: the run fails, or has lost its ranks."""
        try:
            self.finish()
        # Another error is told already, and this one must not take its place.
        except DovetailError as error:
            log.warning("a checkpoint that was being written is dropped: %s", error)
        one, self._under_way = self._under_way, None
        if one is not None:
            self.manager.drop(one.begun)

    def close(self) -> None:
        """Leave nothing behind."""
        self.settle()
        self._thread.shutdown()

    def _commit(self, one: _UnderWay) -> None:
        try:
            one.writers.finish_save()
        except CheckpointError:
            self._under_way = None
            self.manager.drop(one.begun)
            raise
        one.committing = self._thread.submit(self.manager.commit, one.begun)

    def _notice(self, one: _UnderWay) -> None:
        assert one.committing is not None
        self._under_way = None
        # One that failed has left nothing.
        self._written(one.position, one.committing.result(), one.export)
