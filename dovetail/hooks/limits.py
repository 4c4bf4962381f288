"""Time limits that reach code which does not cooperate.

    main thread      an alarm signal raises at the next instruction, also out of a blocking call
    other threads    a watchdog raises at the next Python instruction

The exception is no `Exception`, so that a retry loop around everything does not swallow it, and it
comes again every second until the call has ended.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType, coroutine
from typing import Any

_AGAIN_S = 1.0
_overdue: dict[int, str] = {}
_NO_LIMIT = nullcontext()


class Overdue(BaseException):
    """Raised inside a function that took too long."""

    def __init__(self, where: str = "an unknown place") -> None:
        super().__init__(where)
        self.where = where


def overdue() -> str | None:
    """What to say of a call that did not end although it was interrupted: it stands in C code. None
    while there is none. Whoever waits for its thread waits in vain."""
    return next(iter(_overdue.values()), None)


def time_limit(
    seconds: float | None, file: str, tell: Callable[[str], object] = str
) -> AbstractContextManager[None]:
    """Raise `Overdue` in the body when it takes longer. `file` is the user's, to say where; `tell`
    makes a message of that."""
    if seconds is None:
        return _NO_LIMIT
    if threading.current_thread() is threading.main_thread():
        return _alarm(seconds, file)
    return _watchdog(seconds, file, tell)


@contextmanager
def _alarm(seconds: float, file: str) -> Iterator[None]:
    waiting_s, _ = signal.getitimer(signal.ITIMER_REAL)
    if 0 < waiting_s <= seconds:
        # Somebody's alarm (a call around this one, a test's) comes first.
        yield
        return

    ended = False

    def ring(_: int, frame: FrameType | None) -> None:
        if not ended:
            raise Overdue(_innermost(frame, file))

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if waiting_s:
            left = waiting_s - (time.monotonic() - begun)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))


@contextmanager
def _watchdog(seconds: float, file: str, tell: Callable[[str], object]) -> Iterator[None]:
    ident, ended = threading.get_ident(), threading.Event()
    late: list[str] = []
    turn = threading.Lock()

    def send() -> None:
        with turn:
            if ended.is_set():
                return
            if late:
                _overdue[ident] = str(tell(late[0]))
            late.append(blame_running(ident, file))
            interrupt(ident)

    def watch() -> None:
        wait_s = seconds
        while not ended.wait(wait_s):
            send()
            wait_s = _AGAIN_S

    threading.Thread(target=watch, name="dovetail-hook-limit", daemon=True).start()
    try:
        yield
    except Overdue:
        raise Overdue(late[0]) from None
    finally:
        with turn:
            ended.set()
            _overdue.pop(ident, None)
            # One that was sent and has not arrived must not arrive outside.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)


def interrupt(ident: int) -> None:
    """Raise `Overdue` in another thread at its next Python instruction."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Overdue))


def blame_running(ident: int, file: str) -> str:
    """`file:line, in function` where a thread stands, innermost in the user's file."""
    return _innermost(sys._current_frames().get(ident), file)


def _innermost(frame: FrameType | None, file: str) -> str:
    ours = str(Path(__file__).parent.parent)
    first = None
    while frame is not None:
        code = frame.f_code
        where = f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}"
        if code.co_filename == file:
            return where
        if first is None and not code.co_filename.startswith(ours):
            first = where
        frame = frame.f_back
    return first or "an unknown place"


class Steps:
    """Awaits a user's coroutine, raising `Overdue` where it blocks the loop between two awaits.

    On other threads than the main one a step has no limit: a watchdog for each costs too much.
    """

    def __init__(self, inner: Coroutine[Any, Any, Any], seconds: float, file: str) -> None:
        self._inner, self._file = inner, file
        on_main = threading.current_thread() is threading.main_thread()
        self._seconds = seconds if on_main else None
        self._given_up = False
        self.exited: SystemExit | None = None
        """What the coroutine ended with; out of a task it would end the whole loop."""

    def give_up(self) -> None:
        """From now on a cancellation ends the waiting, whatever the coroutine makes of it."""
        self._given_up = True

    @coroutine
    def run(self) -> Generator[Any, Any, Any]:
        """To be awaited, or made a task of."""
        result: Any = None
        error: BaseException | None = None
        while True:
            try:
                with time_limit(self._seconds, self._file):
                    waiting = self._inner.send(result) if error is None else self._throw(error)
            except StopIteration as stop:
                return stop.value
            except SystemExit as left:
                self.exited = left
                return None
            try:
                result, error = (yield waiting), None
            # Whatever comes from outside, cancellation too, belongs to the inner one.
            except BaseException as outside:
                if self._given_up:
                    raise
                error = outside

    def _throw(self, error: BaseException) -> Any:
        return self._inner.throw(error)
