"""SIGINT and SIGTERM: the first asks the loop to save and leave, the second leaves at once.

During a rollout the first signal cancels it (its prompts go back to where the step began); during
training the step is finished first, so that what is saved is always a whole number of steps.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_WISH_S = 0.5
"""`timeout` and shells send the same signal to the process and to its group."""


class Interrupted(BaseException):
    """Control flow: the current rollout or evaluation was cancelled by a signal."""


class Wish:
    """To end: the first signal in order, a second one at once."""

    def __init__(self) -> None:
        self._since: float | None = None

    def is_first(self, signum: int, doing: str) -> bool:
        """Whether nobody has wished it before; a second wish ends the process here and now."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            name = signal.Signals(signum).name
            sys.stderr.write(f"\n{name}: {doing}; once more leaves at once\n")
            return True
        if now - self._since >= _ONE_WISH_S:
            os._exit(128 + signum)
        return False


class Interrupt:
    """Installs the handlers for the life of a `with` block, and remembers what came."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._wish = Wish()
        self._cancel: Callable[[], object] | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to leave."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention for an end by signal: 128 + its number; 0 without one."""
        return 128 + self.signum if self.signum is not None else 0

    def __enter__(self) -> Interrupt:
        try:
            self._previous = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        except ValueError:  # Not the main thread: whoever runs the loop there owns the signals.
            self._previous = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._wish.is_first(signum, "saving, then leaving"):
            return
        self.signum = signum
        if self._cancel is not None:
            self._cancel()

    def run(self, runner: asyncio.Runner, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the runner's loop; a signal meanwhile cancels it.

        Raises:
            Interrupted: a signal came before the work was done.
        """
        if self.requested:
            work.close()
            raise Interrupted
        loop = runner.get_loop()

        async def cancellable() -> T:
            task = asyncio.ensure_future(work)
            self._cancel = functools.partial(loop.call_soon_threadsafe, task.cancel)
            if self.requested:
                task.cancel()
            return await task

        try:
            return runner.run(cancellable())
        except asyncio.CancelledError:
            if self.requested:
                raise Interrupted from None
            raise
        finally:
            self._cancel = None
