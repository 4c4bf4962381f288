"""Groups under way: started in order, taken as they finish, landed when the step is full."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dovetail.types import Group

_TURNS = 32
"""Turns of the loop in which what an abort ended comes home: it needs no waiting, only its turn."""
_FAREWELL_S = 1.0
"""For user code that cleans up, or swallows its cancellation."""


@dataclass(frozen=True, slots=True)
class Landed:
    """One group's end. Exactly one of `made`, `error`, `cut_off` says how."""

    prompts: Group
    """The group as the source gave it (its samples may have been written to)."""
    made: Group | None = None
    error: Exception | None = None
    cut_off: bool = False
    """Its judges or tools were cancelled."""
    tokens_before: int = 0
    """Response tokens that the source gave with it (partial rollout)."""
    number: int = -1
    """Of the group, as `Flight.launch` gave it."""

    @property
    def new_tokens(self) -> int:
        """Response tokens made since it was launched."""
        return max(0, count_tokens(self.made or self.prompts) - self.tokens_before)


def count_tokens(group: Group) -> int:
    """Response tokens of all siblings."""
    return sum(sample.response_length for sample in group)


class Flight:
    """Runs groups concurrently. Nothing here iterates a set, so equal events give equal order."""

    def __init__(self, run_group: Callable[[Group], Awaitable[Group]]) -> None:
        self._run_group = run_group
        self._in_air: dict[int, tuple[Group, asyncio.Task[None]]] = {}
        self._landed: asyncio.Queue[tuple[int, Landed]] = asyncio.Queue()
        self._launched = 0

    @property
    def in_air(self) -> int:
        """Groups not taken yet."""
        return len(self._in_air)

    def launch(self, groups: list[Group]) -> list[int]:
        """Start these groups, in order; the number of each."""
        numbers = list(range(self._launched, self._launched + len(groups)))
        self._launched += len(groups)
        for number, group in zip(numbers, groups, strict=True):
            self.again(number, group)
        return numbers

    def again(self, number: int, group: Group) -> None:
        """Start a group that was taken before, under the number that it had."""
        self._in_air[number] = (group, asyncio.create_task(self._fly(number, group)))

    async def next(self) -> Landed:
        """Wait for the next group to finish."""
        while True:
            number, landed = await self._landed.get()
            if self._in_air.pop(number, None) is not None:
                return landed

    def landed(self) -> list[Landed]:
        """Those that are finished, without waiting."""
        ends = [self._landed.get_nowait() for _ in range(self._landed.qsize())]
        return [end for number, end in ends if self._in_air.pop(number, None) is not None]

    async def cut(self, numbers: list[int]) -> None:
        """Cut these off, taken or not; nobody learns of their end any more."""
        tasks = [self._in_air.pop(number)[1] for number in numbers if number in self._in_air]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_FAREWELL_S)

    async def land(self, grace_s: float) -> list[Landed]:
        """All others, in the order they were launched; after `grace_s` seconds they are cut off."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        tasks = [task for _, task in self._in_air.values() if not task.done()]
        if tasks and grace_s:
            await asyncio.wait(tasks, timeout=grace_s)
        await self.cancel()
        ends: dict[int, Landed] = {}
        while not self._landed.empty():
            number, landed = self._landed.get_nowait()
            ends[number] = landed
        in_air, self._in_air = self._in_air, {}
        # Cancelled before its first turn, or swallowing its cancellation, a task left no end.
        return [
            ends.get(number, Landed(group, cut_off=True)) for number, (group, _) in in_air.items()
        ]

    async def cancel(self) -> None:
        """Cut off whatever is still in the air, and give it a moment to be gone."""
        tasks = [task for _, task in self._in_air.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_FAREWELL_S)

    async def _fly(self, number: int, group: Group) -> None:
        before = count_tokens(group)
        try:
            made = await self._run_group(group)
            landed = Landed(group, made=made, tokens_before=before, number=number)
        except asyncio.CancelledError:
            landed = Landed(group, cut_off=True, tokens_before=before, number=number)
        # A policy of the rollout: it counts a user's error, and lets ours travel.
        except Exception as error:
            landed = Landed(group, error=error, tokens_before=before, number=number)
        self._landed.put_nowait((number, landed))
