"""From the run's event loop to the fleet's, which runs in a thread of its own, and back.

    run's loop                                fleet's loop
    generate() --run_coroutine_threadsafe--> pool.generate()
       ^   cancelled ---------------------------> cancelled
       +--------------- result --------------------+

The run's loop stands still while the run trains; the fleet's never does, so engines are looked
after all the time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import uvloop

from dovetail.types.calls import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult
from dovetail.types.errors import EngineError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_JOIN_S = 10.0


class LoopThread:
    """A thread that runs an event loop. It is a daemon: it never keeps a process alive."""

    def __init__(self, name: str) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there; the calling thread waits."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def hop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there; the calling task waits. Cancelled with it.

        Raises:
            EngineError: the loop is closed.
        """
        if self.loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise EngineError("the engines are closed")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def stop(self) -> None:
        """End the loop, and what is left on it, and the thread."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()


class Far(Protocol):
    """What lives on the other loop."""

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    async def score(self, request: ScoreRequest) -> ScoreResult: ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> None: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def receive_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]] | None
    ) -> None: ...

    async def close(self) -> None: ...

    @property
    def weight_version(self) -> int: ...


class Link(Protocol):
    """The other loop and what lives there, once they are started."""

    @property
    def thread(self) -> LoopThread: ...

    @property
    def far(self) -> Far: ...

    @property
    def started(self) -> bool: ...

    def ended(self) -> None:
        """What was there is closed: let the thread go."""
        ...


class OnLoop:
    """Implements `Engine`, `EngineControl` and `ScoringEngine` by handing everything on to another
    thread's loop."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def weight_version(self) -> int:
        """Of the weights that were published last."""
        return self._link.far.weight_version

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """As `Engine.generate`; sent to another engine when the first is gone."""
        return await self._link.thread.hop(self._link.far.generate(request))

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """As `ScoringEngine.score`."""
        return await self._link.thread.hop(self._link.far.score(request))

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """As `Engine.abort`."""
        await self._link.thread.hop(self._link.far.abort(request_ids))

    async def pause(self) -> None:
        """As `EngineControl.pause`, all engines."""
        await self._link.thread.hop(self._link.far.pause())

    async def resume(self) -> None:
        """As `EngineControl.resume`, all engines."""
        await self._link.thread.hop(self._link.far.resume())

    async def receive_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]] | None
    ) -> None:
        """As `EngineControl.receive_weights`; the tensors are read in another thread."""
        await self._link.thread.hop(self._link.far.receive_weights(version, tensors))

    async def close(self) -> None:
        """End the engines, and then the thread; nothing if they never started."""
        if not self._link.started:
            return
        await self._link.thread.hop(self._link.far.close())
        self._link.ended()
