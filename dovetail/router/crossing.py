"""Work of the server's loop that is done on the run's loop, which another thread runs, and one look
for all of it at whether that loop reacts: ten thousand requests that each look for themselves twice
a second leave no time for anything else.
"""

from __future__ import annotations

import asyncio
import linecache
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from dovetail.router.fields import RequestError

T = TypeVar("T")

BLOCKED_AFTER_S = 30.0
"""How long the run's loop may not react before requests are refused."""
_CHECK_EVERY_S = 0.5


class Crossing:
    """Waits for work on another loop, from one loop at a time.

    Args:
        ending: whether the run ends, and with it all that waits.
    """

    def __init__(self, ending: Callable[[], bool]) -> None:
        self._ending = ending
        self._waiting: dict[asyncio.Future[Any], float] = {}
        """What is under way -> since when."""
        self._refused: dict[asyncio.Future[Any], RequestError] = {}
        self._watch: asyncio.Task[None] | None = None

    async def over(
        self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, thread_id: int | None
    ) -> T:
        """Run `work` on `loop`, which `thread_id` runs; wait for as long as that stands still.

        Raises:
            RequestError: the run ended meanwhile, or its loop runs but does not react.
        """
        future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
        self._waiting[future] = time.perf_counter()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look(loop, thread_id))
        try:
            return await future
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if own is not None and not own.cancelling():
                # Not our client: `_look`, or the run's loop was taken down.
                ended = RequestError("the run ended meanwhile", status=503)
                raise self._refused.get(future, ended) from None
            raise
        finally:
            del self._waiting[future]
            self._refused.pop(future, None)
            future.cancel()

    async def _look(self, loop: asyncio.AbstractEventLoop, thread_id: int | None) -> None:
        while self._waiting:
            await asyncio.sleep(_CHECK_EVERY_S)
            if self._ending():
                self._refuse(0.0, RequestError("the run ended meanwhile", status=503))
            elif loop.is_running():
                await self._wait_for_sign(loop, thread_id)

    async def _wait_for_sign(self, loop: asyncio.AbstractEventLoop, thread_id: int | None) -> None:
        sign, asked = asyncio.Event(), time.perf_counter()
        # It may be closed by now.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_tell, asyncio.get_running_loop(), sign)
        while self._waiting and loop.is_running() and not self._ending():
            with suppress(TimeoutError):
                await asyncio.wait_for(sign.wait(), _CHECK_EVERY_S)
            if sign.is_set():
                return
            before = time.perf_counter() - BLOCKED_AFTER_S
            if asked < before:
                self._refuse(before, _blocked(thread_id))

    def _refuse(self, before: float, error: RequestError) -> None:
        """End what is under way since then or longer; 0.0: all."""
        for future, since in list(self._waiting.items()):
            if not before or since < before:
                self._refused[future] = error
                future.cancel()


def _blocked(thread_id: int | None) -> RequestError:
    return RequestError(
        f"the run's event loop has not reacted for {BLOCKED_AFTER_S:.0f} s, so nothing can be "
        f"generated: a function blocks it{_where(thread_id)}. Use `await` with an asynchronous "
        "client there, or `await asyncio.to_thread(...)`",
        status=503,
    )


def _where(thread_id: int | None) -> str:
    """The line that the run's thread is at, the user's rather than a library's."""
    frame = sys._current_frames().get(thread_id or -1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "site-packages" not in path and "/lib/python" not in path:
            line = linecache.getline(path, frame.f_lineno).strip()
            return f" (at {path}:{frame.f_lineno}: {line})"
        frame = frame.f_back
    return ""


def _tell(loop: asyncio.AbstractEventLoop, sign: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(sign.set)
