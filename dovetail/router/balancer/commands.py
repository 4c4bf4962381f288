"""What is said to several engines at once: commands, and aborts until they are heeded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from dovetail.router.balancer.dispatch import Dispatch
from dovetail.router.balancer.worker import Call, Interrupt, Worker
from dovetail.types.errors import EngineGoneError

log = logging.getLogger(__name__)

SWEEP_S = 1.0
"""An abort may reach an engine before its request does: it is said again so often."""


async def command_all(
    workers: Iterable[Worker], command: Callable[[Worker], Coroutine[Any, Any, None]]
) -> dict[Worker, Exception]:
    """Run it at all of them at once; gives those that failed. One that is marked dead meanwhile has
    failed."""
    tasks = {worker: asyncio.ensure_future(command(worker)) for worker in workers}
    for worker, task in tasks.items():
        worker.controls.add(task)
        task.add_done_callback(worker.controls.discard)
    try:
        if tasks:
            await asyncio.wait(tasks.values())
    finally:
        for task in tasks.values():
            task.cancel()
    errors: dict[Worker, Exception] = {}
    for worker, task in tasks.items():
        if task.cancelled():
            errors[worker] = EngineGoneError(f"{worker.url} is gone: {worker.reason}")
        elif isinstance(error := task.exception(), Exception):
            errors[worker] = error
    return errors


class Aborts:
    """Ends calls before their time."""

    def __init__(self, dispatch: Dispatch, workers: Mapping[str, Worker]) -> None:
        self._dispatch, self._workers = dispatch, workers
        self._left: set[Call] = set()
        """Their engines were told, and have not ended them yet."""
        self._sweeper: asyncio.Task[None] | None = None
        self.asked = 0

    async def abort(self, request_ids: Sequence[str] | None) -> None:
        """As `Pool.abort`."""
        self.asked += 1
        if request_ids is None:
            calls = list(self._dispatch.calls)
        else:
            calls = [call for name in request_ids for call in self._dispatch.named(name)]
        for call in calls:
            call.aborted = True
            if call.worker is None:
                call.interrupt(Interrupt.ABORT)
        self._left |= {call for call in calls if call.name and call.worker is not None}
        if self._left and self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        if request_ids is None:
            await self._tell(dict.fromkeys(self._workers.values()))
            return
        unknown: list[str] = []
        if self._dispatch.unnamed:
            # A proxied request's name is with its engine only.
            unknown = [name for name in request_ids if not self._dispatch.named(name)]
        await self._tell(self._names(calls, unknown))

    def close(self) -> None:
        """Say nothing more."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _sweep(self) -> None:
        try:
            while self._left:
                await asyncio.sleep(SWEEP_S)
                self._left &= self._dispatch.calls.keys()
                await self._tell(self._names(self._left, []))
        finally:
            self._sweeper = None

    def _names(
        self, calls: Iterable[Call], unknown: list[str]
    ) -> Mapping[Worker, list[str] | None]:
        names = {worker: list(unknown) for worker in self._workers.values()}
        for call in calls:
            if call.worker in names and call.name:
                names[call.worker].append(call.name)
        return {worker: mine for worker, mine in names.items() if mine}

    async def _tell(self, names: Mapping[Worker, list[str] | None]) -> None:
        """None: all requests of the engine."""
        told = [worker.engine.abort(mine) for worker, mine in names.items() if worker.in_flight]
        # An engine that can't be told can't answer either: its requests find that out.
        for error in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(error, Exception):
                log.debug("an engine could not be told of an abort: %s", error)
