"""`rollout.fully_async_data_buffer` (miles): finished groups between producing and training."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from dovetail.compat.modules.collect import Group
from dovetail.compat.modules.filter_types import iter_samples
from dovetail.rollout.waiting import BufferInput as DataBufferConstructorInput
from dovetail.rollout.waiting import WaitingGroup as DataBufferInput
from dovetail.types import Sample

__all__ = [
    "DataBuffer",
    "DataBufferConstructorInput",
    "DataBufferInput",
    "DefaultDataBuffer",
    "Group",
    "first_sample",
    "group_oldest_weight_version",
    "iter_samples",
]


class DataBuffer(ABC):
    """Takes groups as they finish, gives them to training one at a time."""

    @abstractmethod
    async def put(self, input: DataBufferInput) -> None:
        """Take a group, now or when there is room; another one may have to go."""

    @abstractmethod
    async def get(self) -> DataBufferInput:
        """The next group; waits for one."""

    @abstractmethod
    def get_metrics(self) -> dict[str, float]:
        """Counts since the last call."""


class DefaultDataBuffer(DataBuffer):
    """First in, first out (`args.async_data_buffer_order` lifo: the freshest first).

    Holds one step's groups, and then makes the producer wait. With
    `args.async_data_buffer_max_batches` n it holds n steps' groups and throws out the stalest.
    """

    def __init__(self, input: DataBufferConstructorInput) -> None:
        args = input.args
        batches = getattr(args, "async_data_buffer_max_batches", None) or 0
        self._evicts = batches > 0
        self._capacity = max(1, batches) * args.rollout_batch_size
        self._newest_first = getattr(args, "async_data_buffer_order", "fifo") == "lifo"
        self._on_evict = input.unused_handler_fn
        self._entries: list[DataBufferInput] = []
        self._changed = asyncio.Condition()
        self._evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def put(self, input: DataBufferInput) -> None:
        """Take a group; when full, wait, or throw out the stalest."""
        async with self._changed:
            while not self._evicts and len(self._entries) >= self._capacity:
                await self._changed.wait()
            self._entries.append(input)
            if len(self._entries) > self._capacity:
                stalest = min(self._entries, key=_staleness_key)
                self._entries.remove(stalest)
                self._evicted += 1
                self._on_evict(stalest.prompt_group)
            self._changed.notify_all()

    async def get(self) -> DataBufferInput:
        """The next group; waits for one."""
        async with self._changed:
            while not self._entries:
                await self._changed.wait()
            return self._taken()

    def get_nowait(self) -> DataBufferInput | None:
        """The next group; None when there is none."""
        return self._taken() if self._entries else None

    def _taken(self) -> DataBufferInput:
        entry = self._entries.pop(-1 if self._newest_first else 0)
        asyncio.get_running_loop().create_task(self._tell())
        return entry

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def get_metrics(self) -> dict[str, float]:
        """Groups waiting, and groups thrown out since the last call."""
        counts = {"queue_size": float(len(self)), "evicted_groups": float(self._evicted)}
        self._evicted = 0
        return counts


def first_sample(group: Group) -> Sample:
    """The first sample, also of a group whose members fanned out."""
    return next(iter_samples(group))


def group_oldest_weight_version(group: Group) -> int | None:
    """The oldest weight version that any token of the group was sampled under."""
    versions = [sample.oldest_weight_version for sample in iter_samples(group)]
    return min((version for version in versions if version is not None), default=None)


def _staleness_key(entry: DataBufferInput) -> float:
    oldest = group_oldest_weight_version(entry.group)
    return float("inf") if oldest is None else oldest
