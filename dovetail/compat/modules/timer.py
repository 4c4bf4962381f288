"""`utils.timer`: seconds by name, summed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from dovetail.compat.modules.misc import SingletonMeta

__all__ = ["Timer", "inverse_timer", "timer"]

log = logging.getLogger(__name__)


class Timer(metaclass=SingletonMeta):
    """One for the process."""

    def __init__(self) -> None:
        self.timers: dict[str, float] = {}
        self.start_time: dict[str, float] = {}

    def start(self, name: str) -> None:
        """Begin to measure `name`.

        Raises:
            ValueError: it is being measured already.
        """
        if name in self.start_time:
            raise ValueError(f"the timer {name!r} runs already")
        self.start_time[name] = time.perf_counter()

    def end(self, name: str) -> None:
        """Add the seconds since `start`.

        Raises:
            ValueError: it was not started.
        """
        if name not in self.start_time:
            raise ValueError(f"the timer {name!r} was not started")
        elapsed = time.perf_counter() - self.start_time.pop(name)
        self.add(name, elapsed)
        log.debug("%s took %.3f s", name, elapsed)

    def add(self, name: str, elapsed_time: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.timers[name] = self.timers.get(name, 0.0) + elapsed_time

    def reset(self, name: str | None = None) -> None:
        """Forget the seconds of `name`, or all."""
        if name is None:
            self.timers.clear()
        else:
            self.timers.pop(name, None)

    def log_dict(self) -> dict[str, float]:
        """Seconds by name."""
        return self.timers

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        """Measure what is done inside the `with`."""
        self.start(name)
        try:
            yield
        finally:
            self.end(name)


def timer(name_or_func: str | Callable[..., Any]) -> AbstractContextManager[None] | Any:
    """`with timer("name"):`, or a decorator that measures under the function's own name."""
    if isinstance(name_or_func, str):
        return Timer().context(name_or_func)

    @functools.wraps(name_or_func)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with Timer().context(name_or_func.__name__):
            return name_or_func(*args, **kwargs)

    return timed


@contextmanager
def inverse_timer(name: str) -> Iterator[None]:
    """Do not count what is done inside the `with` in a timer that runs around it."""
    Timer().end(name)
    try:
        yield
    finally:
        Timer().start(name)
