"""Only what changed since the last version, without loss: files of deltas that build on each other.

    000005/  all tensors     <- state a
    000006/  delta           <- state b, on top of a
    000007/  delta           <- state c, on top of b

Each directory is a snapshot; in one of deltas a tensor `x` that changed in few places is `x#gaps`
(places between changed ones, a byte each) and `x#values` (the new ones, as bytes), one that changed
in many is `x#whole`, one that did not is missing. A state is a digest of all tensors' digests. An
engine that holds one of the states goes on from there; any other begins with all tensors. The
files of a chain stay until the next one with all tensors, which comes after FULL_EVERY deltas, or
when they have become as large.

With bfloat16 and the small steps of reinforcement learning most numbers stay as they are: see
docs/benchmarks.md. What to compare with lies in a file beside them, never in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
from dovetail.transport.tensor_files import HASH, NamedTensors, bytes_of, dtype_name, tensor_digest
from dovetail.types.errors import EngineError
from dovetail.types.weights import Snapshot

if TYPE_CHECKING:
    import torch

FULL_EVERY = 16
GAPS, VALUES, WHOLE = "#gaps", "#values", "#whole"
_WIDEST_GAP = 255
_MOST_CHANGED = 0.4
"""Of a tensor's numbers; with more it is smaller whole."""
_UINTS = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}


class DeltaStore(SnapshotStore):
    """Writes what changed, and now and then everything. A `Sender`."""

    def __init__(
        self, wanted: Wanted, model_dir: Path, written: Callable[[Path], None] | None = None
    ) -> None:
        # Digests are made here in any case, of the tensors, not of what is written of them.
        super().__init__(replace(wanted, digests=False), model_dir, written)
        self._digests = wanted.digests
        self._chain: list[dict[str, Any]] = []
        self._chain_bytes = 0
        self._shadow: _Shadow | None = None
        self._full_bytes = 0
        self._results: dict[str, str] = {}

    def write(self, version: int, tensors: NamedTensors) -> Snapshot:
        """As `SnapshotStore.write`: a delta where there is something to build on."""
        shadow, self._shadow = self._shadow, None  # Of no use if this breaks off.
        due = len(self._chain) > FULL_EVERY or self._chain_bytes > self._full_bytes
        repeated = any(one["version"] == version for one in self._chain)
        self._results = {}
        if shadow is None or due or repeated:
            if shadow is not None:
                shadow.close()
            shadow, self._chain, self._chain_bytes = _Shadow(self.directory / ".shadow"), [], 0
            source = _copied(tensors, shadow, self._results)
        else:
            source = _changes(tensors, shadow, self._results)
        self._now = shadow
        try:
            snapshot = super().write(version, source)
        except BaseException:
            shadow.close()
            self._chain = []
            raise
        if len(self._chain) == 1:
            self._full_bytes = snapshot.num_bytes
        else:
            self._chain_bytes += snapshot.num_bytes
        self._shadow = shadow
        if self._digests:
            snapshot = replace(snapshot, digests=dict(shadow.digests))
        return snapshot

    def retire(self, before: int) -> None:
        """Remove every version before this one that no later one builds on."""
        needed = {link["version"] for link in self._chain}
        kept = {version: self._kept.pop(version) for version in needed & self._kept.keys()}
        super().retire(before)
        self._kept |= kept

    def close(self) -> None:
        """As `SnapshotStore.close`."""
        if self._shadow is not None:
            self._shadow.close()
            self._shadow = None
        super().close()

    def _facts(self, version: int) -> dict[str, Any]:
        link = {"version": version, "directory": f"{version:06d}", "state": self._now.state()}
        self._chain.append(link)
        return {"state": link["state"], "chain": list(self._chain), "results": self._results}


def _copied(tensors: NamedTensors, shadow: _Shadow, results: dict[str, str]) -> NamedTensors:
    for name, tensor in tensors:
        results[name] = shadow.add(name, tensor)
        yield name, tensor


def _changes(tensors: NamedTensors, shadow: _Shadow, results: dict[str, str]) -> NamedTensors:
    came = set()
    for name, tensor in tensors:
        came.add(name)
        if not shadow.has(name, tensor):
            results[name] = shadow.add(name, tensor)
            yield name + WHOLE, tensor
            continue
        old, new = shadow.numbers(name), _numbers(tensor)
        delta = encoded(old, new)
        if delta is None:
            continue
        results[name] = shadow.replace(name, tensor)
        if isinstance(delta, Sparse):
            yield name + GAPS, _tensor(delta.gaps)
            yield name + VALUES, _tensor(delta.values.view(numpy.uint8))
        else:
            yield name + WHOLE, tensor
    if missing := shadow.names - came:
        raise EngineError(f"the weights lack {len(missing)} of before, e.g. {min(missing)}")


@dataclass(frozen=True, slots=True)
class Sparse:
    """Places that changed."""

    gaps: Any
    """uint8: numbers between this place and the one before. Gaps wider than a byte are crossed by
    places that did not change."""
    values: Any
    """What is there now."""


def encoded(old: Any, new: Any) -> Sparse | bool | None:
    """What changed between two arrays of the same unsigned type: None: nothing; True: too much to
    tell places."""
    if old is None:
        return True
    changed = old != new
    count = int(numpy.count_nonzero(changed))
    if count == 0:
        return None
    if count > _MOST_CHANGED * new.size:
        return True
    places = numpy.flatnonzero(changed)
    before = numpy.concatenate(([-1], places[:-1]))
    fillers = (places - before - 1) // (_WIDEST_GAP + 1)
    if total := int(fillers.sum()):
        ends = numpy.cumsum(fillers)
        within = numpy.arange(total) - numpy.repeat(ends - fillers, fillers) + 1
        crossed = numpy.repeat(before, fillers) + (_WIDEST_GAP + 1) * within
        places = numpy.sort(numpy.concatenate((places, crossed)))
    gaps = numpy.diff(places, prepend=-1) - 1
    return Sparse(gaps.astype(numpy.uint8), new[places])


def applied(base: torch.Tensor, gaps: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of `base` with the changes.

    Raises:
        EngineError: they are of another tensor.
    """
    import torch

    result = base.detach().cpu().clone(memory_format=torch.contiguous_format)
    numbers = _numbers(result)
    places = numpy.cumsum(gaps.numpy().astype(numpy.int64) + 1) - 1
    new = numpy.ascontiguousarray(values.numpy()).view(numbers.dtype)
    if len(new) != len(places) or (len(places) and places[-1] >= len(numbers)):
        raise EngineError("a delta does not fit the tensor that it is of")
    numbers[places] = new
    return result


def rebuilt(
    base: Callable[[str], torch.Tensor | None],
    names: Mapping[str, None],
    deltas: list[tuple[dict[str, torch.Tensor], dict[str, str]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor that deltas change, with all of them applied, compared with its digest.

    Args:
        base: the tensor of a name as it is before the first delta; None: it is new.
        names: all tensors.
        deltas: one behind the other: tensors of its files, and digests of the results by name.

    Raises:
        EngineError: the result of one is not what was written.
    """
    for name in names:
        value, wanted = base(name), None
        for tensors, results in deltas:
            if name not in results:
                continue
            wanted = results[name]
            if name + WHOLE in tensors:
                value = tensors[name + WHOLE]
            elif value is not None and name + GAPS in tensors and name + VALUES in tensors:
                value = applied(value, tensors[name + GAPS], tensors[name + VALUES])
            else:
                raise EngineError(f"the delta of {name} is not there")
        if wanted is None or value is None:
            continue
        if tensor_digest(value) != wanted:
            raise EngineError(f"{name} with its deltas is not what was written")
        yield name, value


class _Shadow:
    """The last version's numbers, in a file."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()  # It goes with the process.
        self._places: dict[str, tuple[int, str, tuple[int, ...]]] = {}
        self.digests: dict[str, str] = {}
        self._size = 0
        self._memory: mmap.mmap | None = None

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def has(self, name: str, tensor: torch.Tensor) -> bool:
        known = self._places.get(name)
        return known is not None and known[1:] == (dtype_name(tensor), tuple(tensor.shape))

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Keep a tensor that is new; its digest."""
        self._places[name] = (self._size, dtype_name(tensor), tuple(tensor.shape))
        self._size += -(-tensor.nbytes // 8) * 8
        return self._put(name, tensor)

    def replace(self, name: str, tensor: torch.Tensor) -> str:
        """Keep what it is now; its digest."""
        return self._put(name, tensor)

    def numbers(self, name: str) -> Any:
        """What it was."""
        import torch

        start, dtype, shape = self._places[name]
        width = getattr(torch, dtype).itemsize
        count = int(numpy.prod(shape, dtype=numpy.int64))
        if self._memory is None or len(self._memory) < self._size:
            self._memory = mmap.mmap(self._handle, self._size) if self._size else None
        if self._memory is None or count == 0:
            return numpy.empty(0, _UINTS[width])
        return numpy.frombuffer(self._memory, _UINTS[width], count, start)

    def state(self) -> str:
        """Of all tensors together."""
        lines = "".join(f"{name} {self.digests[name]}\n" for name in sorted(self.digests))
        return hashlib.new(HASH, lines.encode()).hexdigest()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._handle)

    def _put(self, name: str, tensor: torch.Tensor) -> str:
        os.ftruncate(self._handle, self._size)
        data, start = bytes_of(tensor), self._places[name][0]
        while data:
            written = os.pwrite(self._handle, data, start)
            data, start = data[written:], start + written
        digest = self.digests[name] = tensor_digest(tensor)
        return digest


def _numbers(tensor: torch.Tensor) -> Any:
    """A view as unsigned integers of the same width; tensors of a CPU, in order."""
    raw = numpy.frombuffer(bytes_of(tensor), numpy.uint8)
    if raw.size == 0:
        return numpy.empty(0, _UINTS[tensor.element_size()])
    writable = tensor.device.type == "cpu" and tensor.is_contiguous()
    if writable:
        import torch

        raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return raw.view(_UINTS[tensor.element_size()])


def _tensor(array: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(numpy.ascontiguousarray(array))
