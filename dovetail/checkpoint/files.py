"""Writing the files of a checkpoint: each byte is counted and hashed on its way to the disk.

The hash is of what was meant to be written, not of what can be read back, so a fault below us shows
at the next verification.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dovetail.observe.atomic import fsync_directory
from dovetail.types.errors import CheckpointError

HASH = "sha256"
_READ_BYTES = 4 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a manifest knows about one file."""

    size_bytes: int
    digest: str
    """Hex digest of the content, by `HASH`."""


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileFacts:
    """Write `chunks` to a new file, wait for the disk, and give size and hash of what was written.

    Raises:
        OSError: the file can't be written in full.
    """
    digest, size_bytes = hashlib.new(HASH), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(size_bytes, digest.hexdigest())


def written_files(directory: Path) -> dict[str, FileFacts]:
    """Size and hash of every file below `directory` that somebody else wrote, by its path in it;
    on the disk when this returns.

    Raises:
        OSError: one can't be read, or is no regular file.
    """
    found: dict[str, FileFacts] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            fsync_directory(path)
            continue
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        name = path.relative_to(directory).as_posix()
        found[name] = FileFacts(path.lstat().st_size, digest_of(path))
    fsync_directory(directory)
    return found


def digest_of(path: Path) -> str:
    """Hex digest of a regular file's content; symbolic links are not followed.

    Raises:
        OSError: the file can't be read.
    """
    digest = hashlib.new(HASH)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that may still be written below `path`, or below its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def remove_tree(path: Path) -> None:
    """Remove `path` and all below it as far as possible; what can't be removed stays."""
    shutil.rmtree(path, ignore_errors=True)


def put_in_place(aside: Path, path: Path, replaced: Path) -> None:
    """Rename `aside` to `path`. What is at `path` waits at `replaced` meanwhile, and comes back if
    the renaming fails.

    Raises:
        OSError: renaming failed; `path` is what it was.
    """
    remove_tree(replaced)
    if path.exists():
        path.rename(replaced)
    try:
        aside.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    fsync_directory(path.parent)
    remove_tree(replaced)


def readable_bytes(count: int) -> str:
    """`1536` as `1.5 KB`; powers of 1024."""
    value, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def writing_failed(
    what: str, path: Path, error: OSError, needed: int, cure: str
) -> CheckpointError:
    """The error for `what` that was not written to `path`: reason, bytes needed and free, cure."""
    try:
        room = f"it needs {readable_bytes(needed)}, {readable_bytes(free_bytes(path))} are free"
    except OSError:
        room = f"it needs {readable_bytes(needed)}"
    if error.errno in _FULL:
        full = "the disk is full" if error.errno == errno.ENOSPC else "a limit of space is reached"
        reason = f"{full} ({error.strerror}): {room}"
    elif error.errno in _FORBIDDEN:
        reason = f"the directory can't be written ({error.strerror}): {room}"
    else:
        reason = f"{error.strerror or error}: {room}"
    return CheckpointError(f"{what} was not written to {path}: {reason}. {cure}")
