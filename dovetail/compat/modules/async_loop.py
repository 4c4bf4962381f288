"""`utils.async_utils`: one event loop on a thread of its own, for code that is not async."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = ["AsyncLoopThread", "get_async_loop", "run"]

_FAREWELL_S = 2.0


class AsyncLoopThread:
    """An event loop that runs on a daemon thread until `close`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(
            target=self.loop.run_forever, name="dovetail-plugin-loop", daemon=True
        )
        self.thread.start()

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """What `coro` returns; waits for it.

        Raises:
            RuntimeError: called on the loop itself, where waiting would never end.
        """
        if threading.current_thread() is self.thread:
            coro.close()
            raise RuntimeError("run() was called on its own event loop; await the coroutine there")
        return asyncio.run_coroutine_threadsafe(coro, self.loop).result()

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        if self.loop.is_running():
            asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop)
            self.thread.join(_FAREWELL_S)


async def _cancel_all() -> None:
    own = asyncio.current_task()
    tasks = [task for task in asyncio.all_tasks() if task is not own]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_FAREWELL_S / 2)
    asyncio.get_running_loop().stop()


def get_async_loop() -> AsyncLoopThread:
    """The loop that `run` uses; made when it is first asked for."""
    global _loop
    with _lock:
        if _loop is None or not _loop.loop.is_running():
            _loop = AsyncLoopThread()
            atexit.register(_loop.close)
        return _loop


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` on the background loop and wait for what it returns."""
    return get_async_loop().run(coro)


_loop: AsyncLoopThread | None = None
_lock = threading.Lock()
