"""The user's buffer that finished groups wait in until a step takes them
(custom_async_data_buffer_path)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.types import Group, HookRunError, Sample


@dataclass
class WaitingGroup:
    """One finished group, as miles' `DataBufferInput`."""

    prompt_group: Group
    """The samples as they were given to be answered."""
    group: Group
    weight_version: int | None = None
    """Newest weight version in the group."""


@dataclass(frozen=True)
class BufferInput:
    """What a buffer is made with, as miles' `DataBufferConstructorInput`."""

    args: Any
    unused_handler_fn: Callable[[list[Sample]], None]
    """Takes the prompts of a group that the buffer throws out, to be answered again."""

    @property
    def on_evict(self) -> Callable[[list[Sample]], None]:
        """`unused_handler_fn`, under its other name."""
        return self.unused_handler_fn


class UserBuffer:
    """Hands finished groups to the user's `put`, and asks its `get` for the next one.

    Args:
        make: makes it, from what takes the prompts of a group that it throws out.
        evicted: told the number of such a group.
    """

    def __init__(
        self, make: Callable[[Callable[[list[Sample]], None]], Any], evicted: Callable[[int], None]
    ) -> None:
        self._evicted = evicted
        self._buffer = make(self._throw_out)
        self._numbers: dict[int, int] = {}
        """By the identity of a group's prompts; those that were given to the buffer."""
        self._entries: dict[int, WaitingGroup] = {}
        """By the same: those that it has taken."""
        self._puts: list[asyncio.Task[None]] = []

    def holds(self, number: int) -> bool:
        """Whether the group is in there: it comes out by `next` alone."""
        return number in self._numbers.values()

    async def put(self, number: int, prompts: Group, made: Group) -> None:
        """A group was made. A buffer that is full may make it wait until one was taken."""
        spoken = [int(v) for sample in made for v in sample.weight_versions if v.isdigit()]
        entry = WaitingGroup(prompts, made, max(spoken, default=None))
        self._numbers[id(prompts)] = number
        task = asyncio.ensure_future(self._put(entry))
        self._puts.append(task)
        if not self._entries:
            await task

    async def next(self) -> int | None:
        """The group that the buffer gives; None: it holds none.

        Raises:
            HookRunError: it gave something that was not put into it, or twice.
        """
        if self._puts and not self._entries:
            await asyncio.wait(self._puts, return_when=asyncio.FIRST_COMPLETED)
        done = [task for task in self._puts if task.done()]
        self._puts = [task for task in self._puts if not task.done()]
        for task in done:
            task.result()
        if not self._entries:
            return None
        entry = await _answer(self._buffer.get())
        prompts = getattr(entry, "prompt_group", None)
        number = self._numbers.pop(id(prompts), None)
        if number is None:
            raise HookRunError(
                f"the buffer's get() gave back a {type(entry).__name__} that is no waiting group; "
                "expected one that put() got, each once (--custom-async-data-buffer-path, TOML: "
                "hooks.custom_async_data_buffer_path)"
            )
        self._entries.pop(id(prompts), None)
        return number

    def metrics(self) -> dict[str, float]:
        """What it tells, as `rollout/buffer/...`."""
        told = self._buffer.get_metrics() or {}
        return {f"rollout/buffer/{name}": value for name, value in told.items()}

    async def _put(self, entry: WaitingGroup) -> None:
        await _answer(self._buffer.put(entry))
        if id(entry.prompt_group) in self._numbers:
            self._entries[id(entry.prompt_group)] = entry

    def _throw_out(self, prompts: list[Sample]) -> None:
        number = self._numbers.pop(id(prompts), None)
        self._entries.pop(id(prompts), None)
        if number is not None:
            self._evicted(number)


async def _answer(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
