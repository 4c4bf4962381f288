"""Where a process stands that does not come back: in the user's code, in a library, or waiting for
something outside."""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
import sysconfig
import threading
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

_OURS = str(Path(__file__).resolve().parents[2])
_STANDARD = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
_OUTSIDE = re.compile(
    r"[/\\](ssl|socket|subprocess|selectors)\.py$|[/\\](http|urllib|ftplib|smtplib)[/\\]|"
    r"[/\\]asyncio[/\\](streams|subprocess|sslproto)\.py$"
)
_DUMPED = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, in {self.name}"


class Kind(StrEnum):
    """What keeps it."""

    USER = "user"
    """The user's own code: a loop, a sleep, a lock."""
    IMPORT = "import"
    """A library is being imported."""
    LIBRARY = "library"
    """Inside an installed package."""
    OUTSIDE = "outside"
    """Waiting for a socket or another process."""
    NOWHERE = "nowhere"
    """None of the user's lines is on any stack."""


@dataclass(frozen=True)
class Standstill:
    """What keeps it, and the user's line that leads there."""

    kind: Kind
    where: str


def is_users(file: str, home: str) -> bool:
    """Whether a file is the user's: beside the hook's own, or in none of the known places."""
    if file.startswith(("<", _OURS)):
        return False
    own = home and home not in _INSTALLED
    if own and file.startswith(home) and (home.startswith(_INSTALLED) or not _standard(home)):
        return True
    return not (_standard(file) or file.startswith(_INSTALLED))


def _standard(path: str) -> bool:
    return path.startswith(_STANDARD)


def standstill(stacks: Iterable[Sequence[Frame]], home: str) -> Standstill:
    """The first stack (innermost frame first) that leads through the user's code."""
    for stack in stacks:
        found = _of_stack(stack, home)
        if found is not None:
            return found
    return Standstill(Kind.NOWHERE, "none of its lines is running")


def _of_stack(stack: Sequence[Frame], home: str) -> Standstill | None:
    at = next((i for i, frame in enumerate(stack) if is_users(frame.file, home)), None)
    if at is None:
        return None
    return Standstill(_kind([frame.file for frame in stack[:at]]), str(stack[at]))


def _kind(inner: Sequence[str]) -> Kind:
    if any(file.startswith("<frozen importlib") for file in inner):
        return Kind.IMPORT
    if any(_OUTSIDE.search(file) for file in inner):
        return Kind.OUTSIDE
    if any(file.startswith(_INSTALLED) for file in inner):
        return Kind.LIBRARY
    return Kind.USER


def read_dump(text: str) -> list[list[Frame]]:
    """The stacks that `faulthandler` or `write_stacks` wrote, the current thread's first."""
    stacks: list[tuple[bool, list[Frame]]] = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x", "Stack (most recent")):
            stacks.append((line.startswith("Thread"), []))
        found = _DUMPED.match(line)
        if found and stacks:
            stacks[-1][1].append(Frame(found[1], int(found[2]), found[3]))
    return [stack for _, stack in sorted(stacks, key=lambda pair: pair[0])]


def write_stacks(asked_fd: int, dump_fd: int) -> None:
    """For every byte that comes in on `asked_fd`, write the stacks of the other threads, the main
    thread's first, for `read_dump`. On a thread of its own: no other one moves meanwhile."""
    main = threading.main_thread().ident
    while os.read(asked_fd, 1):
        here = threading.get_ident()
        frames = {ident: f for ident, f in sys._current_frames().items() if ident != here}
        order = sorted(frames, key=lambda ident: ident != main)
        # At once: whoever waits for it looks at the file's size.
        os.write(dump_fd, "".join(_dumped(ident, frames[ident]) for ident in order).encode())


def _dumped(ident: int, frame: FrameType) -> str:
    head = "Current thread" if ident == threading.main_thread().ident else "Thread"
    lines = (f'  File "{one.file}", line {one.line} in {one.name}\n' for one in _stack(frame))
    return f"{head} 0x{ident:016x} (most recent call first):\n{''.join(lines)}\n"


def live_stacks() -> list[list[Frame]]:
    """The stacks of this process: coroutines that wait (the longest chain of awaits first, whoever
    drives it), then other threads."""
    waiting = [_awaiting(one) for one in gc.get_objects() if _is_suspended(one)]
    return [*sorted(waiting, key=len, reverse=True), *_other_threads()]


def main_stack() -> list[Frame]:
    """Where the main thread is, for another one."""
    return _stack(sys._current_frames().get(threading.main_thread().ident or 0))


def imports_beside(home: str) -> bool:
    """Whether another thread imports a library on behalf of the user's code."""
    found = (_of_stack(stack, home) for stack in _other_threads())
    return any(one is not None and one.kind is Kind.IMPORT for one in found)


def _other_threads() -> list[list[Frame]]:
    here = threading.get_ident()
    frames = sys._current_frames()
    return [_stack(frame) for ident, frame in frames.items() if ident != here]


def _is_suspended(found: Any) -> bool:
    # By its type: looking into any other object could run code of its own.
    return type(found) is types.CoroutineType and (
        inspect.getcoroutinestate(found) == inspect.CORO_SUSPENDED
    )


def _awaiting(coroutine: Any) -> list[Frame]:
    """The frames from a coroutine down to what it waits for, innermost first."""
    frames = []
    while coroutine is not None:
        frame = _first(coroutine, "cr_frame", "gi_frame", "ag_frame")
        if frame is not None:
            frames.append(_frame(frame))
        coroutine = _first(coroutine, "cr_await", "gi_yieldfrom", "ag_await")
    return frames[::-1]


def _first(owner: Any, *names: str) -> Any:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _stack(frame: FrameType | None) -> list[Frame]:
    frames = []
    while frame is not None:
        frames.append(_frame(frame))
        frame = frame.f_back
    return frames


def _frame(frame: FrameType) -> Frame:
    return Frame(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name)
