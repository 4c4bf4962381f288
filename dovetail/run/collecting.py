"""What gives each step its samples: collected when the step asks (max_lag 0), or meanwhile.

    max_lag 0   take(k) --collect(k)--> samples; between two takes nothing happens
    max_lag n   advance(version) --> pump: collect(k), collect(k + 1), ... one after the other, as
                far as the window allows --> gathered --take(k)--> samples

The pump is a task of the run's loop, and the loop turns while the trainer trains in its own thread.
Where the built-in rollout collects, groups are made for all open steps at once (`StreamRollout`). A
rollout function of the user's is called for one step at a time, as it is without a lag: ahead of
the training, never twice at once.

A checkpoint is of what is trained. `unused_put_back` shows the source as it is when everything
else went back to it: groups that are made with their responses, those under way as prompts. What a
user's function has collected ahead is undone instead: the source is shown as it was before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from dovetail.observe.trace import recording_run
from dovetail.rollout.measure import lag_metrics
from dovetail.rollout.pending import oldest_version, start_over
from dovetail.rollout.stream import StreamRollout
from dovetail.types import CheckpointError, DovetailError, Group, RolloutOutput
from dovetail.types.ports import DataSource

T = TypeVar("T")
Collect = Callable[[int], Awaitable[RolloutOutput]]

_LOOK_EVERY_S = 0.2


class Collecting:
    """Collects a step when it is asked for (max_lag 0)."""

    goes_on = False
    """Whether samples are made while the trainer trains."""

    def __init__(self, collect: Collect, source: DataSource | None, trace: bool = False) -> None:
        self._collect_untraced, self.source, self._trace = collect, source, trace
        self._before: Any = None
        """The source's state before the step under way."""

    def begins(self) -> None:
        """A step is about to be taken."""
        self._before = snapshot_of(self.source)

    async def take(self, step: int) -> RolloutOutput:
        """The samples of a step."""
        return await self._collect(step)

    def rewind(self) -> None:
        """Put the source back to where the step under way began."""
        if self.source is not None and self._before is not None:
            restore_to(self.source, self._before)

    def settled(self) -> None:
        """The step under way is whole: nothing of it is ever put back."""
        self._before = None

    def updating(self) -> None:
        """The engines are about to get new weights; `advance` says when they have them."""

    def advance(self, done: int, version: int | None) -> None:
        """So many steps are trained, and the engines were given these weights (None: no new ones).
        Called on the loop."""

    async def hold(self, leaving: bool) -> None:
        """Let the source come to rest for a checkpoint; `leaving`: end what is under way."""

    def go_on(self) -> None:
        """After `hold`."""

    @contextmanager
    def unused_put_back(self) -> Iterator[None]:
        """Inside, the source is as a checkpoint has to have it."""
        yield

    async def close(self) -> None:
        """End what is under way."""

    async def _collect(self, step: int) -> RolloutOutput:
        with recording_run(self._trace):
            return await self._collect_untraced(step)


class CollectingAhead(Collecting):
    """Collects steps before they are asked for, as far as the lag allows.

    Args:
        stream: what `collect` comes down to, where it is the built-in rollout; None: a function of
            the user's collects.
        max_lag: publishes that tokens may lie behind the weights that they train.
        keeps_stale: train also what is older.
        group_size: samples of a group as the source takes it back.
    """

    goes_on = True

    def __init__(
        self,
        collect: Collect,
        source: DataSource,
        *,
        num_steps: int,
        max_lag: int,
        stream: StreamRollout | None,
        keeps_stale: bool = False,
        group_size: int = 1,
        trace: bool = False,
    ) -> None:
        super().__init__(collect, source, trace)
        self._source = source
        self._stream, self._num_steps, self._max_lag = stream, num_steps, max_lag
        self._keeps_stale, self._group_size = keeps_stale, group_size
        self._next = self._version = -1
        self._gathered: dict[int, RolloutOutput] = {}
        self._befores: dict[int, Any] = {}
        """The source's state before each step that a user's function collected and that is not
        trained."""
        self._pump: asyncio.Task[None] | None = None
        self._held = self._running = False
        self._changed = asyncio.Event()

    def begins(self) -> None:
        """Steps begin by themselves."""

    def settled(self) -> None:
        """See `advance`."""

    def rewind(self) -> None:
        """A checkpoint puts everything back that is not trained."""

    async def take(self, step: int) -> RolloutOutput:
        """The samples of a step, once they are gathered."""
        assert self._pump is not None, "weights are published before the first step"
        while step not in self._gathered:
            if self._pump.done():
                self._pump.result()
                raise asyncio.CancelledError
            await self._wait()
        return self._gathered.pop(step)

    def updating(self) -> None:
        """See `StreamRollout.updating`."""
        if self._stream is not None:
            self._stream.updating()

    def advance(self, done: int, version: int | None) -> None:
        """So many steps are trained, and the engines were given these weights."""
        if self._pump is None:
            self._start(done)
        elif self._stream is not None:
            self._stream.trained(done - 1)
        for step in [step for step in self._befores if step < done]:
            del self._befores[step]
        self._version = self._version if version is None else version
        if self._stream is not None:
            self._stream.published(self._version)
        self._changed.set()

    async def hold(self, leaving: bool) -> None:
        """A user's function finishes the step that it collects: its prompts are out of the source,
        and nobody else knows which."""
        if self._stream is not None or self._pump is None:
            return
        self._held = True
        if leaving:
            await self.close()
        while self._running and self._pump is not None and not self._pump.done():
            await self._wait()

    def go_on(self) -> None:
        """After `hold`."""
        self._held = False
        self._changed.set()

    @contextmanager
    def unused_put_back(self) -> Iterator[None]:
        """Inside, the source is as if what is not trained had never left it, or had come back.

        Raises:
            CheckpointError: the source takes nothing back.
        """
        now = snapshot_of(self._source)
        try:
            if self._befores:
                restore_to(self._source, self._befores[min(self._befores)])
            elif self._stream is not None:
                self._put_back(self._stream.unused())
            yield
        finally:
            restore_to(self._source, now)

    async def close(self) -> None:
        """End what is under way. The next `advance` begins anew."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})
        if self._stream is not None:
            await self._stream.close()
        self._pump = None

    def _start(self, done: int) -> None:
        self._next, self._version = done, -1
        self._gathered, self._befores, self._held = {}, {}, False
        if self._stream is not None:
            self._stream.starts_at(done, self._num_steps)
        self._pump = asyncio.get_running_loop().create_task(self._run())
        self._pump.add_done_callback(lambda task: self._changed.set())

    async def _run(self) -> None:
        while self._next < self._num_steps:
            while self._held or not self._may_begin(self._next):
                await self._wait()
            self._running = True
            try:
                self._gathered[self._next] = await self._collect_next()
            finally:
                self._running = False
            self._next += 1
            self._changed.set()

    async def _collect_next(self) -> RolloutOutput:
        step = self._next
        if self._stream is not None:
            return await self._collect(step)
        self._befores[step] = snapshot_of(self._source)
        while True:
            output = await self._collect(step)
            stale = [] if self._keeps_stale else self._stale(output, step)
            for group in stale:
                output.samples.remove(group)
                if len(group) == self._group_size:
                    self._source.add_samples([start_over(group)])
            if output.samples or not stale:
                output.metrics |= lag_metrics(output.samples, step, self._max_lag)
                output.metrics["rollout/stale_groups"] = float(len(stale))
                return output

    def _stale(self, output: RolloutOutput, step: int) -> list[Group]:
        oldest = [(group, oldest_version(group)) for group in output.samples]
        return [
            group
            for group, version in oldest
            if version is not None and step - version > self._max_lag
        ]

    def _may_begin(self, step: int) -> bool:
        if self._stream is not None:
            return self._stream.may_begin(step)
        return step <= self._version + self._max_lag

    def _put_back(self, groups: list[Group]) -> None:
        if not groups:
            return
        try:
            self._source.add_samples(groups)
        except (DovetailError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(
                f"the data source does not take back the {len(groups)} groups that are not trained "
                f"yet: {error}. Use one with a buffer (--data-source-path, TOML: "
                "hooks.data_source_path), or --max-lag 0"
            ) from error

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def meanwhile(work: Future[T], check: Callable[[], object]) -> T:
    """The result of what another thread works on, while the loop turns; `check()` is called now
    and then, and may raise where waiting on is of no use."""
    waiting = asyncio.wrap_future(work)
    while True:
        await asyncio.wait({waiting}, timeout=_LOOK_EVERY_S)
        if waiting.done():
            return waiting.result()
        check()


def snapshot_of(source: Any) -> Any:
    """What `restore_to` needs. A user's source may have a quicker way than its whole state."""
    if source is None:
        return None
    return source.snapshot() if hasattr(source, "snapshot") else source.state_dict()


def restore_to(source: Any, before: Any) -> None:
    """Make a source again what it was."""
    if hasattr(source, "restore"):
        source.restore(before)
    else:
        source.load_state_dict(before)
