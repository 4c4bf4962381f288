"""The directory that a Ray of the run's own writes in, which goes with the run; what a killed run
left is removed by the next one.

    made -> lock held by this process -> removed
                                      -> killed: the lock is free -> the next run removes it
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "dovetail-ray-"
_LOCK = "run.lock"


class SessionDirectory:
    """A new, empty directory of this process, from now to `remove`."""

    def __init__(self) -> None:
        remove_left()
        # Short, for the paths of sockets below it have at most 107 characters.
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_place()))
        # Locked before it has its name: nobody ever sees a free lock of a process that lives.
        unnamed = self.path / f".{_LOCK}"
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove it, with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left() -> None:
    """Remove directories of this user whose process is gone."""
    for path in _place().glob(f"{_PREFIX}*"):
        # Somebody else's, or just removed by another run.
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid() and _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left(path: Path) -> bool:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        # About to get its lock, or nothing of ours.
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _place() -> Path:
    """Where a directory with a short name can be made, else wherever the system puts such."""
    return Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
