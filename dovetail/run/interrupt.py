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
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Control flow: the current rollout or evaluation was cancelled by a signal."""


class Interrupt:
    """Installs the handlers for the life of a `with` block, and remembers what came."""

    def __init__(self) -> None:
        self.signum: int | None = None
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
        if self.requested:
            os._exit(128 + signum)
        self.signum = signum
        name = signal.Signals(signum).name
        sys.stderr.write(f"\n{name}: saving, then leaving; once more leaves at once\n")
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
