"""The receiving side of a snapshot: nothing of it is used unless all of it arrived."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.transport.place import MANIFEST
from dovetail.transport.tensor_files import TORCH_DTYPES, file_digest, tensor_in
from dovetail.types.errors import EngineError

if TYPE_CHECKING:
    import torch

_MOST_HEADER_BYTES = 64 << 20
_POPULATE_READ = 22
"""MADV_POPULATE_READ, Linux 5.14."""


@dataclass(frozen=True, slots=True)
class Received:
    """Weights that lie in files. The tensors are views of them: valid while they are open."""

    version: int
    tensors: dict[str, torch.Tensor]


def check_whole(directory: Path) -> int:
    """The version of the weights in `directory`, all of which are there as they were written.

    Sizes are always compared; digests where the writer made them, which is on disks.

    Raises:
        EngineError: it is not a snapshot, or damaged, or one that it builds on is.
    """
    manifest = manifest_of(directory)
    for link in manifest.get("chain", [])[:-1]:
        _check_files(directory.parent / link["directory"])
    _check_files(directory)
    return int(manifest["version"])


def _check_files(directory: Path) -> None:
    manifest = manifest_of(directory)
    for name, facts in manifest["files"].items():
        path = directory / name
        _check_size(path, facts["size_bytes"])
        if facts["sha256"] is not None and file_digest(path) != facts["sha256"]:
            raise EngineError(f"the weights in {path} are not those that were written")


def read_snapshot(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a snapshot by name, after `check_whole`.

    Raises:
        EngineError: it is not a snapshot, or damaged.
    """
    with SnapshotReader().opened(directory) as received:
        yield from received.tensors.items()


def is_snapshot(directory: Path) -> bool:
    """Whether a run wrote it, so that `check_whole` can be asked."""
    return (directory / MANIFEST).is_file()


class SnapshotReader:
    """Maps files, and keeps the maps: those of memory come again with every other version."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int, int], mmap.mmap] = {}
        self._last: set[tuple[int, int, int]] = set()

    @contextlib.contextmanager
    def opened(self, directory: Path) -> Iterator[Received]:
        """The tensors of a snapshot, which stay as they are meanwhile.

        Raises:
            EngineError: it is not a snapshot, or damaged, or was written again.
        """
        manifest = manifest_of(directory)
        version, used = int(manifest["version"]), set()
        tensors: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            for name, facts in manifest["files"].items():
                path = directory / name
                handle = _locked(path)
                stack.callback(_unlocked, handle)
                _check_size(path, facts["size_bytes"])
                if facts["sha256"] is not None and file_digest(path) != facts["sha256"]:
                    raise EngineError(f"the weights in {path} are not those that were written")
                key, memory = self._mapped(handle)
                used.add(key)
                tensors |= _tensors(path, memory, version)
            self._keep(used)
            yield Received(version, tensors)

    def _mapped(self, handle: int) -> tuple[tuple[int, int, int], mmap.mmap]:
        facts = os.fstat(handle)
        key = (facts.st_dev, facts.st_ino, facts.st_size)
        if key not in self._maps:
            # Private and writable, because torch wants memory that it could write; nobody does.
            memory = mmap.mmap(handle, facts.st_size, flags=mmap.MAP_PRIVATE)
            with contextlib.suppress(OSError, ValueError):
                memory.madvise(_POPULATE_READ)
            self._maps[key] = memory
        return key, self._maps[key]

    def _keep(self, used: set[tuple[int, int, int]]) -> None:
        """What was used neither now nor the last time is let go. Never closed: a tensor that looks
        into it keeps it from going, but not from being closed."""
        for key in self._maps.keys() - used - self._last:
            del self._maps[key]
        self._last = used


def manifest_of(directory: Path) -> dict[str, Any]:
    """What the writer says of the files.

    Raises:
        EngineError: nothing that can be understood.
    """
    try:
        found: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
        files = found["files"]
        good = isinstance(found["version"], int) and isinstance(files, dict)
        for name, facts in files.items():
            good = good and os.path.basename(name) == name
            good = good and isinstance(facts["size_bytes"], int) and "sha256" in facts
        for link in found.get("chain", []):
            good = good and os.path.basename(link["directory"]) == link["directory"]
            good = good and isinstance(link["state"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{directory} has no readable weights: {error!r}") from error
    if not good:
        raise EngineError(f"{directory / MANIFEST} is damaged")
    return found


def _locked(path: Path) -> int:
    """A handle of the file, which nobody writes as long as it is open."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EngineError(f"{path} can't be read: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise EngineError(f"the weights in {path} are being written over") from error
    except OSError:
        pass  # File systems without locks are disks, where no file is written twice.
    return handle


def _unlocked(handle: int) -> None:
    # To close it is not enough: a map keeps the open file, and the lock with it.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _tensors(path: Path, memory: mmap.mmap, version: int) -> dict[str, torch.Tensor]:
    """Views of what a file has.

    Raises:
        EngineError: it is damaged, or of another version.
    """
    length = int.from_bytes(memory[:8], "little")
    end = len(memory) - 8 - length
    if not 0 < length <= _MOST_HEADER_BYTES or end < 0:
        raise EngineError(f"{path} is damaged, or was never finished")
    try:
        header = json.loads(memory[8 : 8 + length])
        found = header.pop("__metadata__", {}).get("version")
        views = {
            name: tensor_in(
                memory,
                8 + length + facts["data_offsets"][0],
                TORCH_DTYPES[facts["dtype"]],
                facts["shape"],
            )
            for name, facts in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise EngineError(f"the header of {path} is damaged: {error!r}") from error
    if found not in (None, str(version)):
        raise EngineError(f"{path} has version {found} by now, no longer {version}")
    return views


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise EngineError(f"{path} can't be read: {error.strerror}") from error
    if size != expected:
        raise EngineError(f"{path} has {size} bytes, {expected} were written")
