"""Threads and tasks of users' functions that never return: ending a run does not wait for them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

USER_THREADS = "user-code"
"""Names of threads that run users' functions begin with it."""
_MOST_THREADS = 128
_FAREWELL_S = 2.0
_LOOK_EVERY_S = 0.2


class UserThreads(ThreadPoolExecutor):
    """The loop's threads for plain functions of users. Shutting down does not wait for them."""

    def __init__(self) -> None:
        super().__init__(_MOST_THREADS, thread_name_prefix=USER_THREADS)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let idle threads go."""
        super().shutdown(wait=False, cancel_futures=True)


async def end_tasks() -> None:
    """Cancel every other task of this loop, and give them a moment to be gone."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if not tasks:
        return
    _, stuck = await asyncio.wait(tasks, timeout=_FAREWELL_S)
    for task in stuck:
        log.warning("left behind: %s does not end when it is cancelled", task.get_coro())


@contextmanager
def users_runner() -> Iterator[asyncio.Runner]:
    """A runner of a loop that users' functions live in."""
    runner = asyncio.Runner()
    runner.get_loop().set_default_executor(UserThreads())
    try:
        yield runner
    finally:
        close_runner(runner)


def close_runner(runner: asyncio.Runner) -> None:
    """Close the loop; one with tasks that can't be ended is left as it is."""
    runner.run(end_tasks())
    if not asyncio.all_tasks(runner.get_loop()):
        runner.close()


def wait_for(future: Future[T], check: Callable[[], object]) -> T:
    """The result of a future that another thread works on; `check()` is called now and then, and
    may raise where waiting on is of no use."""
    while True:
        try:
            return future.result(timeout=_LOOK_EVERY_S)
        except TimeoutError:
            if future.done():
                return future.result()
            check()


def leave(code: int) -> None:
    """End this process, also while a thread is stuck in a function that never returns.

    Python waits for every thread before it leaves; this waits a moment.
    """
    deadline = time.monotonic() + _FAREWELL_S
    stuck = False
    for thread in threading.enumerate():
        if thread.name.startswith((USER_THREADS, "compute")):
            thread.join(max(0.0, deadline - time.monotonic()))
            stuck = stuck or thread.is_alive()
    if not stuck:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # Nobody reads it any more.
            continue
    os._exit(code)
