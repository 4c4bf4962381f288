"""Who gets which engine, and who waits for one: slots, a bounded queue, and a policy.

    take() --room--> slot of an engine            give_back() --slot--> first in the queue
       +---no room--> queue (bounded), until a slot is free, the time is over, or it is stopped

A slot is given before its owner wakes, so that it can't be given twice; an owner that was stopped
before it woke gives it back. Requests that are sent again stand before those that came later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from dovetail.router.balancer.pick import Policy
from dovetail.router.balancer.worker import Call, Worker
from dovetail.types.errors import EngineBusyError


class Places:
    """The slots of all engines.

    Args:
        per_worker: slots of each.
        queue_size: most requests that wait.
    """

    def __init__(self, policy: Policy, per_worker: int, queue_size: int) -> None:
        self.policy, self.per_worker, self.queue_size = policy, per_worker, queue_size
        self.paused = False
        """Nobody gets a slot."""
        self._ready: list[Worker] = []
        self._dialect: str | None = None
        self._all_score = False
        self._again: dict[Call, asyncio.Future[Worker]] = {}
        """Those that had a slot before; they come first."""
        self._queue: dict[Call, asyncio.Future[Worker]] = {}
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._again) + len(self._queue)

    def all_in(self, workers: set[Worker]) -> bool:
        """Whether no engine but these gives slots."""
        return all(worker in workers for worker in self._ready)

    def use(self, workers: Iterable[Worker]) -> None:
        """From now on these give slots."""
        self._ready = [worker for worker in workers if worker.ready]
        dialects = {worker.dialect for worker in self._ready}
        self._dialect = dialects.pop() if len(dialects) == 1 else None
        self._all_score = all(worker.can_score for worker in self._ready)
        self.serve()

    def take(self, call: Call) -> Worker | None:
        """A slot at once, for a request that nobody stands before."""
        if self._queue or self._again or self.paused:
            return None
        return self._take(call, asyncio.get_running_loop().time())

    async def wait(self, call: Call, again: bool = False) -> Worker:
        """A slot, sooner or later.

        Args:
            again: it was sent before, and stands before those that were not.

        Raises:
            EngineBusyError: the queue is full.
        """
        if not again and len(self._queue) >= self.queue_size:
            raise EngineBusyError(
                f"every engine is busy and {len(self._queue)} requests wait, which is the most "
                "(--router-queue-size, TOML: router.router_queue_size): come again later"
            )
        future: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        queue = self._again if again else self._queue
        queue[call] = future
        self.serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(future.result())
            raise
        finally:
            queue.pop(call, None)

    def give_back(self, worker: Worker) -> None:
        """The slot is free."""
        worker.in_flight -= 1
        if not worker.in_flight:
            worker.empty.set()
        if self._queue or self._again:
            self.serve()

    def serve(self) -> None:
        """Give free slots to those who wait."""
        if self.paused or not (self._queue or self._again):
            return
        now = asyncio.get_running_loop().time()
        if self._serve(self._again, now):
            self._serve(self._queue, now)
        self._set_alarm(now)

    def _serve(self, queue: dict[Call, asyncio.Future[Worker]], now: float) -> bool:
        """Give slots to those in this queue; whether there may be more slots."""
        served = []
        free = sum(self.per_worker - one.in_flight for one in self._ready if _allows(one, now))
        for call, future in queue.items():
            if free <= 0:
                break
            if future.done():
                continue
            worker = self._take(call, now)
            if worker is not None:
                future.set_result(worker)
                served.append(call)
                free -= 1
            elif not self._picky(call):
                free = 0
        for call in served:
            del queue[call]
        return free > 0

    def _take(self, call: Call, now: float) -> Worker | None:
        most = self.per_worker
        workers = [one for one in self._ready if one.in_flight < most and _allows(one, now)]
        if self._picky(call):
            workers = [one for one in workers if _suits(one, call)]
        if not workers:
            return None
        worker = self.policy.pick(call, workers)
        worker.in_flight += 1
        worker.empty.clear()
        worker.breaker.begin(now)
        return worker

    def _picky(self, call: Call) -> bool:
        """Whether some engine might not do."""
        return (
            bool(call.avoid)
            or (call.scores and not self._all_score)
            or (call.dialect is not None and call.dialect != self._dialect)
        )

    def _set_alarm(self, now: float) -> None:
        """Look again when the first engine that must be left alone now may be asked."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        times = [max(one.busy_until, one.breaker.next_at) for one in self._ready]
        later = [at for at in times if at > now]
        if later and (self._queue or self._again):
            self._alarm = asyncio.get_running_loop().call_at(min(later), self.serve)


def _allows(worker: Worker, now: float) -> bool:
    return now >= worker.busy_until and worker.breaker.allows(now)


def _suits(worker: Worker, call: Call) -> bool:
    return (
        (call.dialect is None or worker.dialect == call.dialect)
        and (worker.can_score or not call.scores)
        and worker not in call.avoid
    )
