"""Files that are either wholly there or not at all, whatever moment the process dies at."""

from __future__ import annotations

import os
from pathlib import Path

ASIDE_SUFFIX = ".writing"
"""A file with this ending is a write that never finished; nothing reads it."""


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace `path` by `data` in one step: written aside in the same directory, then renamed.

    `durable` also waits until the bytes and the name are on the disk, so they survive a power cut.

    Raises:
        OSError: the file can't be written; `path` is as it was and nothing is left aside.
    """
    aside = path.with_name(f".{path.name}{ASIDE_SUFFIX}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Wait until the names in `path` are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
