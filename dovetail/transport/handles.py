"""Buckets in memory that rank 0 and the engines have mapped: GPU memory by CUDA's handles for other
processes, and where there is no GPU torch's shared memory, which goes the same way.

A handle is a plain description, checked before it is opened; torch would send a pickle, which runs
code in whoever reads it. Opened once, it serves every later bucket that lies there.

The way over GPU memory has not been run here, for want of a GPU.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any

from dovetail.transport.buckets import NUM_BUCKETS
from dovetail.transport.meeting import Table
from dovetail.types.errors import BrokenUpdateError

if TYPE_CHECKING:
    import torch

_SEGMENT = re.compile(r"/torch_[0-9]+_[0-9]+_[0-9]+")
_MANAGER = re.compile(r"/[^\0]*/torch-shm-dir-[A-Za-z0-9]+/manager\.sock")
_OF_CUDA = ("handle", "ref_counter_handle", "event_handle")
_CUDA_HANDLE_BYTES = (64, 66)
"""Of CUDA, and of torch, which puts two bytes before it."""


class HandleSending:
    """See `buckets.Sending`."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._rooms: dict[int, torch.Tensor] = {}
        self._handles: dict[int, dict[str, Any]] = {}

    def room(self, number: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """As `Sending.room`: the bucket that was there is given back by every engine."""
        slot = number % NUM_BUCKETS
        if number >= NUM_BUCKETS:
            self._table.wait_for(f"back {number - NUM_BUCKETS}", self._table.meeting.num_engines)
        if slot not in self._rooms or len(self._rooms[slot]) < num_bytes:
            self._rooms[slot] = _shared(num_bytes, device)
            self._handles[slot] = _described(self._rooms[slot])
        return self._rooms[slot]

    def facts(self, number: int, num_bytes: int) -> dict[str, Any]:
        """The handle; everything that was written is there before it is told."""
        import torch

        slot = number % NUM_BUCKETS
        if self._rooms[slot].device.type == "cuda":
            torch.cuda.synchronize(self._rooms[slot].device)
        return self._handles[slot]

    def send(self, number: int, num_bytes: int) -> None:
        """Nothing: it is where engines look."""

    def finish(self) -> None:
        """Nothing: who has taken everything says so."""

    def close(self) -> None:
        """Let go of the memory, which engines keep as long as they look at it."""
        self._rooms.clear()


class HandleTaking:
    """See `buckets.Taking`."""

    def __init__(self, table: Table, device: torch.device) -> None:
        self._table, self._device = table, device
        self._opened: dict[str, torch.UntypedStorage] = {}

    def take(self, number: int, facts: dict[str, Any]) -> torch.Tensor:
        """As `Taking.take`."""
        import torch

        try:
            key = str(facts["handle"])
            if key not in self._opened:
                self._opened[key] = _opened(facts, self._device)
            storage, size = self._opened[key], int(facts["num_bytes"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BrokenUpdateError(f"a handle can't be opened: {error}") from error
        if size > storage.nbytes():
            raise BrokenUpdateError(f"{size} bytes of a bucket that has {storage.nbytes()}")
        room = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return room.set_(storage, 0, (size,))  # type: ignore[no-any-return, call-overload]

    def give_back(self, number: int) -> None:
        """As `Taking.give_back`, when the copies are really made."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._table.count(f"back {number}")

    def close(self) -> None:
        """Let go of the memory."""
        self._opened.clear()


def _shared(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that another process can map."""
    import torch

    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,))  # type: ignore[no-any-return, call-overload]


def _described(room: torch.Tensor) -> dict[str, Any]:
    """How another process finds it."""
    storage = room.untyped_storage()
    if room.device.type == "cuda":
        names = "device handle bytes offset ref_counter_handle ref_counter_offset event_handle sync"
        found = dict(zip(names.split(), storage._share_cuda_(), strict=True))
        return {
            "kind": "cuda",
            **found,
            **{name: base64.b64encode(found[name]).decode() for name in _OF_CUDA},
        }
    manager, segment, size = storage._share_filename_cpu_()
    return {
        "kind": "cpu",
        "manager": manager.decode(),
        "handle": segment.decode(),
        "bytes": size,
    }


def _opened(facts: dict[str, Any], device: torch.device) -> torch.UntypedStorage:
    """The memory that is described.

    Raises:
        ValueError: it is no description of such memory.
    """
    import torch

    if facts["kind"] == "cpu":
        manager, segment = str(facts["manager"]), str(facts["handle"])
        if not _SEGMENT.fullmatch(segment) or not _MANAGER.fullmatch(manager):
            raise ValueError(f"{segment!r} is not torch's shared memory")
        found: torch.UntypedStorage = torch.UntypedStorage._new_shared_filename_cpu(
            manager.encode(), segment.encode(), int(facts["bytes"])
        )
        return found
    raw = {name: base64.b64decode(facts[name], validate=True) for name in _OF_CUDA}
    if facts["kind"] != "cuda" or len(raw["handle"]) not in _CUDA_HANDLE_BYTES:
        raise ValueError("it is no CUDA handle")
    index = device.index if device.index is not None else torch.cuda.current_device()
    mapped: torch.UntypedStorage = torch.UntypedStorage._new_shared_cuda(
        index,
        raw["handle"],
        int(facts["bytes"]),
        int(facts["offset"]),
        raw["ref_counter_handle"],
        int(facts["ref_counter_offset"]),
        raw["event_handle"],
        bool(facts["sync"]),
    )
    return mapped
