"""Tensors hand to hand: rank 0 fills one of two buckets while engines take the other.

What differs is how the bytes of a bucket reach an engine (`Sending`, `Taking`): a broadcast of a
process group, or memory that both sides have mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.transport.meeting import Table
from dovetail.transport.tensor_files import NamedTensors, dtype_name, tensor_digest
from dovetail.types.errors import BrokenUpdateError

if TYPE_CHECKING:
    import torch

NUM_BUCKETS = 2
"""At a time."""
_ALIGNMENT = 64


class Sending(Protocol):
    """Rank 0's side of a way."""

    def room(self, number: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Bytes for a bucket, which no engine reads any more."""
        ...

    def facts(self, number: int, num_bytes: int) -> dict[str, Any]:
        """What engines must know of it."""
        ...

    def send(self, number: int, num_bytes: int) -> None:
        """Its tensors are all there, and engines know of it."""
        ...

    def finish(self) -> None:
        """Everything is sent: have it all arrive."""
        ...

    def close(self) -> None: ...


class Taking(Protocol):
    """An engine's side of a way."""

    def take(self, number: int, facts: dict[str, Any]) -> torch.Tensor:
        """The bytes of a bucket, valid until it is given back."""
        ...

    def give_back(self, number: int) -> None:
        """Its tensors are copied."""
        ...

    def close(self) -> None: ...


@dataclass
class Sent:
    """What was sent."""

    num_bytes: int = 0
    num_tensors: int = 0
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class _Bucket:
    """One under way."""

    number: int
    room: torch.Tensor
    used: int = 0
    tensors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """Copy it there, if there is room."""
        import torch

        start = -(-self.used // _ALIGNMENT) * _ALIGNMENT
        if start + tensor.nbytes > len(self.room):
            return False
        place = self.room[start : start + tensor.nbytes]
        place.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        facts = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "offset": start}
        self.tensors.append({"name": name, **facts})
        self.used = start + tensor.nbytes
        return True


def send_all(
    table: Table, sending: Sending, tensors: NamedTensors, bucket_bytes: int, *, digests: bool
) -> Sent:
    """Send every tensor, a bucket at a time; returns when all engines have all of them.

    Args:
        bucket_bytes: of all buckets together; a larger tensor has one of its own.
        digests: make one of each tensor.

    Raises:
        BrokenUpdateError: an engine is gone, or too slow.
    """
    sent, bucket, number = Sent(), None, 0
    for name, tensor in tensors:
        if bucket is None or not bucket.add(name, tensor):
            if bucket is not None:
                _pass_on(table, sending, bucket)
            size = max(bucket_bytes // NUM_BUCKETS, tensor.nbytes)
            bucket = _Bucket(number, sending.room(number, size, tensor.device))
            number += 1
            assert bucket.add(name, tensor), "a bucket holds one tensor at least"
        sent.num_bytes += tensor.nbytes
        sent.num_tensors += 1
        if digests:
            sent.digests[name] = tensor_digest(tensor)
    if bucket is not None:
        _pass_on(table, sending, bucket)
    sending.finish()
    table.say(str(number), {"end": sent.num_tensors})
    table.wait_for("done", table.meeting.num_engines)
    return sent


def _pass_on(table: Table, sending: Sending, bucket: _Bucket) -> None:
    facts = sending.facts(bucket.number, bucket.used)
    told = {"tensors": bucket.tensors, "num_bytes": bucket.used, "way": facts}
    table.say(str(bucket.number), told)
    sending.send(bucket.number, bucket.used)


def take_all(
    table: Table, taking: Taking, check: Callable[[str, tuple[int, ...]], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, each valid until the next is asked for; ends when all of them came.

    Args:
        check: told of every name and shape of a bucket before its bytes are taken; what it raises
            goes on from here.

    Raises:
        BrokenUpdateError: the trainer is gone, or it broke off.
    """
    number = came = 0
    while "end" not in (told := table.hear(str(number))):
        try:
            places = [_Place.read(facts, int(told["num_bytes"])) for facts in told["tensors"]]
            way = dict(told["way"], num_bytes=int(told["num_bytes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrokenUpdateError(f"a bucket can't be understood: {error!r}") from error
        for place in places:
            check(place.name, place.shape)
        room = taking.take(number, way)
        for place in places:
            yield place.name, place.of(room)
            came += 1
        taking.give_back(number)
        number += 1
    if told["end"] != came:
        raise BrokenUpdateError(f"{came} tensors came, {told['end']} were sent")


def all_taken(table: Table) -> None:
    """This engine has everything, and calls it so."""
    table.count("done")


@dataclass(frozen=True, slots=True)
class _Place:
    """One tensor in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @classmethod
    def read(cls, facts: dict[str, Any], room_bytes: int) -> _Place:
        import torch

        dtype, shape = getattr(torch, facts["dtype"]), tuple(facts["shape"])
        if not isinstance(dtype, torch.dtype) or any(not isinstance(n, int) for n in shape):
            raise ValueError(f"{facts['dtype']} {shape} is no tensor")
        size, offset = math.prod(shape) * dtype.itemsize, int(facts["offset"])
        if min(shape, default=0) < 0 or offset < 0 or offset + size > room_bytes:
            raise ValueError(f"{facts['name']} lies outside of its bucket")
        return cls(str(facts["name"]), dtype, shape, offset, size)

    def of(self, room: torch.Tensor) -> torch.Tensor:
        return room[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)
