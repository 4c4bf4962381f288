"""Buckets by broadcast, in a process group of rank 0 and the engines that lives for one update.

Its members have no other group in common, and are others from update to update: engines join,
leave and die. To make a group anew takes milliseconds with gloo; with NCCL, which has not been run
here for want of two GPUs, about a second.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dovetail.transport.buckets import NUM_BUCKETS
from dovetail.transport.meeting import Table
from dovetail.types.errors import BrokenUpdateError

if TYPE_CHECKING:
    import torch

_MOST_SAID = 300


class BroadcastSending:
    """See `buckets.Sending`. A broadcast is under way while the next bucket is filled."""

    def __init__(self, table: Table) -> None:
        self._group = _group(table)
        self._on_gpu = table.meeting.backend == "nccl"
        self._rooms: dict[int, torch.Tensor] = {}
        self._works: dict[int, Any] = {}

    def room(self, number: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """As `Sending.room`."""
        import torch

        slot = number % NUM_BUCKETS
        self._wait(slot)
        if slot not in self._rooms or len(self._rooms[slot]) < num_bytes:
            place = device if self._on_gpu else torch.device("cpu")
            self._rooms[slot] = torch.empty(num_bytes, dtype=torch.uint8, device=place)
        return self._rooms[slot]

    def facts(self, number: int, num_bytes: int) -> dict[str, Any]:
        """Nothing: everybody knows the group."""
        return {}

    def send(self, number: int, num_bytes: int) -> None:
        """As `Sending.send`."""
        slot = number % NUM_BUCKETS
        # One after the other: gloo's broadcasts would share the wires, and none be done early.
        self._wait(1 - slot)
        self._works[slot] = _broadcast(self._group, self._rooms[slot][:num_bytes])

    def finish(self) -> None:
        """As `Sending.finish`."""
        for slot in range(NUM_BUCKETS):
            self._wait(slot)

    def close(self) -> None:
        """Leave the group: whoever waits for us learns of it."""
        self._works.clear()
        _leave(self._group)
        del self._group

    def _wait(self, slot: int) -> None:
        if slot in self._works:
            _done(self._works, slot)


class BroadcastTaking:
    """See `buckets.Taking`."""

    def __init__(self, table: Table, device: torch.device) -> None:
        self._group = _group(table)
        self._device = device if table.meeting.backend == "nccl" else "cpu"
        self._room: torch.Tensor | None = None
        self._works: dict[int, Any] = {}

    def take(self, number: int, facts: dict[str, Any]) -> torch.Tensor:
        """As `Taking.take`."""
        import torch

        size = facts["num_bytes"]
        if self._room is None or len(self._room) < size:
            self._room = torch.empty(size, dtype=torch.uint8, device=self._device)
        room = self._room[:size]
        self._works[0] = _broadcast(self._group, room)
        _done(self._works, 0)
        return room

    def give_back(self, number: int) -> None:
        """Nothing: the bytes are ours."""

    def close(self) -> None:
        """Leave the group."""
        self._works.clear()
        _leave(self._group)
        del self._group


def _group(table: Table) -> Any:
    """A process group that nothing else in this process knows of."""
    import torch.distributed as dist

    meeting = table.meeting
    size, patience = meeting.num_engines + 1, timedelta(seconds=meeting.patience_s)
    try:
        if meeting.backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = patience
            return dist.ProcessGroupNCCL(table.store, table.rank, size, nccl)
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._timeout = patience
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(meeting.host))]
        return dist.ProcessGroupGloo(table.store, table.rank, size, gloo)
    except RuntimeError as error:
        raise BrokenUpdateError(f"the group of {size} was not made: {_said(error)}") from error


def _own_address(host: str) -> str:
    """The one that this machine reaches `host` from, and is reached at by it."""
    address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    if ipaddress.ip_address(str(address[4][0])).is_loopback:
        return str(address[4][0])
    with socket.socket(address[0], socket.SOCK_DGRAM) as probe:
        probe.connect(address[4])  # Nothing is sent.
        return str(probe.getsockname()[0])


def _broadcast(group: Any, room: torch.Tensor) -> Any:
    import torch.distributed as dist

    try:
        return group.broadcast([room], dist.BroadcastOptions())
    except RuntimeError as error:
        raise BrokenUpdateError(f"a broadcast failed: {_said(error)}") from error


def _done(works: dict[int, Any], slot: int) -> None:
    """Wait for one of them, which then is forgotten.

    A work keeps its group's connections open, and others wait for an end of them: none may be left
    in a frame that an error remembers.
    """
    try:
        works[slot].wait()
    except RuntimeError as error:
        raise BrokenUpdateError(f"a broadcast broke off: {_said(error)}") from None
    finally:
        del works[slot]


def _leave(group: Any) -> None:
    # One that is broken can't be left in order either; its connections end with it.
    with contextlib.suppress(RuntimeError):
        group.abort()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST_SAID]
