"""What carries weights from rank 0 to engines in other processes, behind one interface.

    files     send(version, tensors) -> snapshot          then engines load it, whenever they like
    meetings  announce(version, engines) -> snapshot      engines load it while rank 0 sends:
              send(version, tensors) -> snapshot          neither gets on without the other

`weights/publish.py` has the order of the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dovetail.transport.broadcast import BroadcastSending
from dovetail.transport.buckets import Sending, send_all
from dovetail.transport.delta import DeltaStore
from dovetail.transport.handles import HandleSending
from dovetail.transport.meeting import PATIENCE_S, Host, Table
from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
from dovetail.transport.tensor_files import NamedTensors
from dovetail.types.errors import BrokenUpdateError, EngineError
from dovetail.types.weights import MEETINGS, Snapshot

log = logging.getLogger(__name__)


class Sender(Protocol):
    """One way of the weights. Every call blocks; they come one after the other."""

    meets: bool
    """Whether engines must be there while it sends."""

    def announce(self, version: int, num_engines: int) -> Snapshot:
        """What so many engines are to load while `send` runs. Only where it `meets`."""
        ...

    def send(self, version: int, tensors: NamedTensors) -> Snapshot:
        """Send all tensors, each valid until the next is asked for.

        Raises:
            EngineError: they can't be written in full, or (BrokenUpdateError) an engine is gone.
        """
        ...

    def retire(self, before: int) -> None:
        """Every engine has the weights of this version, or later ones."""
        ...

    def close(self) -> None:
        """Release everything. A second call does nothing."""
        ...


def make_sender(
    wanted: Wanted, model_dir: Path, written: Callable[[Path], None] | None = None
) -> Sender:
    """What `wanted` asks for.

    Args:
        model_dir: Hugging Face directory whose configuration and tokenizer lie beside weights.
        written: called with the directory of each version that is a file on a disk or in memory,
            before any engine learns of it.

    Raises:
        ConfigError: weights have no place.
    """
    if wanted.transport in MEETINGS:
        return MeetingSender(wanted)
    if wanted.delta:
        return DeltaStore(wanted, model_dir, written)
    return SnapshotStore(wanted, model_dir, written)


class MeetingSender:
    """Gives weights hand to hand. A `Sender`."""

    meets = True

    def __init__(self, wanted: Wanted, patience_s: float = PATIENCE_S) -> None:
        self._wanted, self._patience_s = wanted, patience_s
        self._host: Host | None = None
        self._next: Snapshot | None = None

    def announce(self, version: int, num_engines: int) -> Snapshot:
        """As `Sender.announce`."""
        if self._host is None:
            self._host = Host(self._wanted.host)
        own = self._wanted
        meeting = self._host.announce(
            own.transport, version, num_engines, own.backend, self._patience_s
        )
        self._next = Snapshot(version, None, own.num_bytes, meeting)
        return self._next

    def send(self, version: int, tensors: NamedTensors) -> Snapshot:
        """As `Sender.send`, to those who were announced.

        Raises:
            BrokenUpdateError: an engine did not come, is gone or too slow. None of them calls
                what it has the new version; the next try may succeed.
        """
        snapshot, self._next = self._next, None
        if snapshot is None or snapshot.version != version:
            raise EngineError(f"weights of version {version} are sent unannounced")
        assert self._host is not None and snapshot.meeting is not None
        table, started = self._host.table(snapshot.meeting), time.perf_counter()
        sending: Sending | None = None
        try:
            table.wait_for("joined", snapshot.meeting.num_engines)
            table.say("go")
            sending = _sending(table)
            asked = self._wanted
            sent = send_all(table, sending, tensors, asked.bucket_bytes, digests=asked.digests)
            table.clear()
        except BaseException as error:
            table.break_off(f"the trainer broke off: {error!r}")
            if isinstance(error, BrokenUpdateError):
                raise BrokenUpdateError(f"weights of version {version}: {error}") from error
            raise
        finally:
            if sending is not None:
                sending.close()
        seconds = time.perf_counter() - started
        log.info("weights of version %d: %d bytes in %.2f s", version, sent.num_bytes, seconds)
        return Snapshot(
            version, None, sent.num_bytes, snapshot.meeting, sent.digests if asked.digests else None
        )

    def retire(self, before: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """As `Sender.close`."""
        self._host = None


def _sending(table: Table) -> Sending:
    if table.meeting.transport == "broadcast":
        return BroadcastSending(table)
    return HandleSending(table)
