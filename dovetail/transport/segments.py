"""Files in /dev/shm that are written again and again, version after version: their pages are there
already, so that a version costs one pass over memory.

    version 1 -> set 0    version 2 -> set 1    version 3 -> set 0 ...

An engine that reads a file holds a shared lock on it (`flock`), which ends with its process. A file
that somebody still reads is never written: it is left to them, and a new one takes its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.transport.tensor_files import HEADER_BYTES, Layout, tensor_in

if TYPE_CHECKING:
    import torch

_SETS = 2
"""One version is read while the next is written."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, Linux 5.14."""
_PIECE_BYTES = 8 << 20
_MOST_THREADS = 8


class _Segment:
    """One file, mapped."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.path, self.capacity = path, capacity
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(path, flags, 0o600)
        try:
            os.ftruncate(self._handle, HEADER_BYTES + capacity)
            self.memory = mmap.mmap(self._handle, HEADER_BYTES + capacity)
        except BaseException:
            os.close(self._handle)
            raise

    def taken(self) -> bool:
        """Whether nobody reads it; then it is ours until `give`."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        os.ftruncate(self._handle, HEADER_BYTES + self.capacity)
        self.memory[:8] = bytes(8)
        return True

    def give(self, num_bytes: int) -> None:
        os.ftruncate(self._handle, HEADER_BYTES + num_bytes)
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    def prefault(self, num_bytes: int) -> None:
        """Have its pages, as far as the system can be asked for them."""
        end = HEADER_BYTES + min(num_bytes, self.capacity)
        with contextlib.suppress(OSError, ValueError):
            for start in range(0, end, _PIECE_BYTES):
                self.memory.madvise(_POPULATE_WRITE, start, min(_PIECE_BYTES, end - start))

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._handle)
        # The memory is not closed: it goes with the last tensor that looks into it.


class SegmentFile:
    """A segment under way; see `TensorFile`."""

    def __init__(self, segment: _Segment, copiers: ThreadPoolExecutor, num_copiers: int) -> None:
        self.layout = Layout(segment.capacity)
        self.path = segment.path
        self._segment, self._copiers, self._num_copiers = segment, copiers, num_copiers

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Copy it there; returns when all of it is."""
        import torch

        offset = HEADER_BYTES + self.layout.add(name, tensor)
        if tensor.nbytes == 0:
            return
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            dtype = str(tensor.dtype).removeprefix("torch.")
            place = tensor_in(self._segment.memory, offset, dtype, list(tensor.shape))
            place.copy_(tensor.detach())
            return
        place = tensor_in(self._segment.memory, offset, "uint8", [tensor.nbytes])
        source = tensor.detach().reshape(-1).view(torch.uint8)
        self._copy(place.numpy(), source.numpy())

    def finish(self, version: int) -> tuple[int, str | None]:
        """As `TensorFile.finish`; memory gets no digest."""
        self._segment.memory[:HEADER_BYTES] = self.layout.header(version)
        self._segment.give(self.layout.num_bytes)
        return HEADER_BYTES + self.layout.num_bytes, None

    def drop(self) -> None:
        """As `TensorFile.drop`: without a header it is nothing."""
        self._segment.give(0)

    def _copy(self, place: Any, source: Any) -> None:
        """As many threads as are worth it; numpy copies without the interpreter's lock."""
        import numpy

        pieces = min(self._num_copiers, -(-len(source) // _PIECE_BYTES))
        size = -(-len(source) // max(pieces, 1))
        parts = [slice(start, start + size) for start in range(0, len(source), size)]
        jobs = [self._copiers.submit(numpy.copyto, place[part], source[part]) for part in parts[1:]]
        numpy.copyto(place[parts[0]], source[parts[0]])
        wait(jobs)
        for job in jobs:
            job.result()


class Segments:
    """The files of one run.

    Args:
        directory: a new one below /dev/shm.
        bucket_bytes: of a file; one tensor may be larger.
        num_bytes: of one version, whose pages are made ready in the background; 0: not known.
        reuse: write files again. Only where every reader locks them.
    """

    def __init__(self, directory: Path, bucket_bytes: int, num_bytes: int, *, reuse: bool) -> None:
        directory.mkdir(mode=0o700)
        self._directory, self._bucket_bytes, self._reuse = directory, bucket_bytes, reuse
        self._sets: list[list[_Segment]] = [[] for _ in range(_SETS)]
        self._versions: list[int | None] = [None] * _SETS
        self._number = 0
        self._num_copiers = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
        self._copiers = ThreadPoolExecutor(self._num_copiers, thread_name_prefix="weights")
        self._closed = False
        self._preparing: threading.Thread | None = None
        if num_bytes and reuse:
            self._preparing = threading.Thread(
                target=self._prepare, args=(num_bytes,), name="weights-pages", daemon=True
            )
            self._preparing.start()

    def begin(self, version: int, kept: set[int]) -> None:
        """A version is about to be written.

        Args:
            kept: versions that somebody may still want to read.
        """
        self._join()
        free = [one for one, held in enumerate(self._versions) if held not in kept]
        self._now = free[0] if free else 0
        if not free or not self._reuse:
            self._forget(self._now)
        self._versions[self._now] = version

    def file(self, number: int, num_bytes: int) -> SegmentFile:
        """The `number`-th file of the version, from 0, for at least so many bytes.

        Raises:
            OSError: there is no memory for it.
        """
        own, capacity = self._sets[self._now], max(self._bucket_bytes, num_bytes)
        if number < len(own) and (own[number].capacity < capacity or not own[number].taken()):
            own[number].close()
            own[number] = self._new(capacity)
            assert own[number].taken(), "nobody knows of it yet"
        elif number == len(own):
            own.append(self._new(capacity))
            assert own[number].taken(), "nobody knows of it yet"
        return SegmentFile(own[number], self._copiers, self._num_copiers)

    def close(self) -> None:
        """Let go of everything; who reads a file has it until then."""
        self._closed = True
        self._join()
        for number in range(_SETS):
            self._forget(number)
        self._copiers.shutdown()

    def _new(self, capacity: int) -> _Segment:
        self._number += 1
        return _Segment(self._directory / f"{self._number:06d}", capacity)

    def _forget(self, number: int) -> None:
        for segment in self._sets[number]:
            segment.close()
        self._sets[number].clear()
        self._versions[number] = None

    def _prepare(self, num_bytes: int) -> None:
        """Pages cost as much as the copy into them: they are had while engines start."""
        for own in self._sets:
            left = num_bytes
            while left > 0 and not self._closed:
                try:
                    own.append(segment := self._new(self._bucket_bytes))
                except OSError:
                    return  # Whoever writes a version is told.
                segment.prefault(left)
                left -= self._bucket_bytes

    def _join(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
