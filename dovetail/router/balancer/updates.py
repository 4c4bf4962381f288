"""New weights to the engines of one pool, all of them or, one that comes back, alone.

Weights that last (`Snapshot.lasting`) an engine that comes, or comes back, is given at once. Those
that went hand to hand are nowhere any more: it waits, and takes part in the next update.

Engines come and go between the moment that an update is announced to so many and the moment that it
begins, and they fail in it. Hand to hand nobody can finish then: the try is broken off at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from dovetail.router.balancer.commands import command_all
from dovetail.router.balancer.worker import Worker
from dovetail.transport.meeting import break_off
from dovetail.types.errors import BrokenUpdateError, EngineError, EngineGoneError
from dovetail.types.weights import Snapshot

if TYPE_CHECKING:
    from dovetail.router.balancer.pool import Pool


class Updates:
    """Belongs to a pool, whose `snapshot` and `update_lock` it keeps."""

    def __init__(self, pool: Pool, some_ready: Callable[[], Awaitable[None]]) -> None:
        self._pool, self._some_ready = pool, some_ready
        self._joining: dict[Worker, asyncio.Future[Snapshot]] = {}
        self._ends: set[asyncio.Future[None]] = set()

    @property
    def num_receivers(self) -> int:
        """Engines that the next `load` is for."""
        return len(self._pool.ready()) + len(self._joining)

    def forget(self, worker: Worker) -> None:
        """It is dead, or was taken out: it takes part in no update, and `admit` of it fails."""
        coming = self._joining.pop(worker, None)
        if coming is not None and not coming.done():
            why = f"{worker.url} waited for the next weights: {worker.reason}"
            coming.set_exception(EngineGoneError(why))

    async def load(self, snapshot: Snapshot, patience_s: float) -> None:
        """As `Pool.load`; `patience_s` is the longest wait for an engine to be there."""
        pool = self._pool
        async with pool.update_lock:
            pool.snapshot = snapshot
            errors = await self._load_all(snapshot)
            pool.places.policy.forget(list(pool.workers.values()))
        broken = [error for error in errors.values() if isinstance(error, BrokenUpdateError)]
        if broken:
            raise BrokenUpdateError(f"{len(broken)} engines wait for another try: {broken[0]}")
        reasons = "; ".join(str(error) for error in errors.values()) or "there is none"
        try:
            async with asyncio.timeout(patience_s):
                await self._some_ready()
        except (TimeoutError, EngineError) as error:
            why = pool.hopeless or reasons
            raise EngineError(
                f"no engine has the weights of version {snapshot.version}: {why}"
            ) from error

    async def admit(self, url: str) -> None:
        """As `Pool.admit`."""
        pool, worker = self._pool, self._pool.worker(url)
        epoch, given = worker.epoch, None
        while True:
            async with pool.update_lock:
                snapshot = pool.snapshot
                if snapshot is None or snapshot.lasting or given is snapshot:
                    await self._let_in(worker, epoch, snapshot, given=given is not None)
                    return
                coming = self._joining[worker] = asyncio.get_running_loop().create_future()
            try:
                given = await coming
            finally:
                if self._joining.get(worker) is coming:
                    del self._joining[worker]

    async def _let_in(
        self, worker: Worker, epoch: int, snapshot: Snapshot | None, *, given: bool
    ) -> None:
        pool, url = self._pool, worker.url
        if snapshot is not None:
            if not given:
                await worker.engine.load_snapshot(snapshot)
            version = await worker.engine.weight_version()
            if version != snapshot.version:
                raise EngineError(
                    f"{url} got weights of version {snapshot.version} and says that it has "
                    f"{version}"
                )
        # It may have died while everything was paused, and only `ready` engines are resumed.
        await worker.engine.resume()
        if worker.epoch != epoch or pool.workers.get(url) is not worker:
            raise EngineError(f"{url} died while it was given its weights: {worker.reason}")
        worker.weight_version = None if snapshot is None else snapshot.version
        pool.mark_ready(url)

    async def _load_all(self, snapshot: Snapshot) -> dict[Worker, Exception]:
        """At all of them at once; gives the failures. Who failed by itself is dead."""
        pool, ready = self._pool, self._pool.ready()
        joining = {} if snapshot.lasting else dict(self._joining)
        epochs = {worker: worker.epoch for worker in ready}
        receivers = [*ready, *joining]
        if snapshot.meeting is not None and snapshot.meeting.num_engines != len(receivers):
            raise BrokenUpdateError(
                f"announced to {snapshot.meeting.num_engines} engines; now there are "
                f"{len(receivers)}"
            )
        errors = await command_all(receivers, lambda worker: self._take(worker, snapshot))
        for worker in ready:
            error = errors.get(worker)
            if error is None:
                worker.weight_version = snapshot.version
            elif not isinstance(error, BrokenUpdateError) and worker.epoch == epochs[worker]:
                pool.mark_dead(worker.url, f"load_snapshot failed: {error}")
                pool.on_failure(worker, error)
        for worker, coming in joining.items():
            error = errors.get(worker)
            if coming.done() or isinstance(error, BrokenUpdateError):
                continue
            if error is None:
                coming.set_result(snapshot)
            else:
                coming.set_exception(error)
        return errors

    async def _take(self, worker: Worker, snapshot: Snapshot) -> None:
        try:
            await worker.engine.load_snapshot(snapshot)
        except BaseException as error:
            # The others would wait for it until their patience is over.
            if snapshot.meeting is not None and not isinstance(error, BrokenUpdateError):
                reason = f"{worker.url} is gone: {error!r}"
                end = asyncio.ensure_future(asyncio.to_thread(break_off, snapshot.meeting, reason))
                self._ends.add(end)
                end.add_done_callback(self._ends.discard)
            raise
