"""New weights to the engines of one pool, all of them or, one that comes back, alone.

Weights that last (`Snapshot.lasting`) an engine that comes back is given at once. Those that went
hand to hand are nowhere any more: it waits, and takes part in the next update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from dovetail.router.balancer.commands import command_all
from dovetail.router.balancer.worker import Worker
from dovetail.types.errors import BrokenUpdateError, EngineError
from dovetail.types.weights import Snapshot

if TYPE_CHECKING:
    from dovetail.router.balancer.pool import Pool


class Updates:
    """Belongs to a pool, whose `snapshot` and `update_lock` it keeps."""

    def __init__(self, pool: Pool, some_ready: Callable[[], Awaitable[None]]) -> None:
        self._pool, self._some_ready = pool, some_ready
        self._joining: dict[Worker, asyncio.Future[Snapshot]] = {}

    @property
    def num_receivers(self) -> int:
        """Engines that the next `load` is for."""
        return len(self._pool.ready()) + len(self._joining)

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
                self._joining.pop(worker, None)

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
        errors = await command_all(
            [*ready, *joining], lambda worker: worker.engine.load_snapshot(snapshot)
        )
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
