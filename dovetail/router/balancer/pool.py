"""Several engines as one: a request is answered exactly once, whatever becomes of the engines.

The pool restarts nothing: it says who failed (`on_failure`), and somebody else says who is dead
(`mark_dead`) and who may be used again (`admit`). Everything in it runs on one event loop; how a
request finds its engine is in dispatch.py and places.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from dovetail.router.balancer.commands import Aborts, command_all
from dovetail.router.balancer.dispatch import Dispatch, StaleAnswerError, Stats, Stopped
from dovetail.router.balancer.pick import make_policy
from dovetail.router.balancer.places import Places
from dovetail.router.balancer.updates import Updates
from dovetail.router.balancer.worker import Call, Interrupt, Worker, WorkerState
from dovetail.types.calls import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
)
from dovetail.types.errors import EngineError
from dovetail.types.ports import RemoteEngine, ScoringEngine
from dovetail.types.weights import Snapshot

log = logging.getLogger(__name__)
T = TypeVar("T")


def _nobody(worker: Worker, error: Exception) -> None:
    pass


class Pool:
    """Implements `Engine` and `ScoringEngine` over remote engines.

    Args:
        policy: a name of `pick.POLICIES`.
        per_worker: most requests at once in each engine.
        queue_size: most requests that wait; further ones get EngineBusyError.
        request_timeout_s: longest time for one request, waiting and sending again included.
        failure_threshold: so many requests in a row must fail until an engine gets no more for a
            while.
        on_failure: told of each engine that broke a request off or failed a command. One that
            failed a command, or answered with old weights, is dead already then.
        repaired: somebody brings dead engines back, so that it is worth waiting for one.
    """

    def __init__(
        self,
        *,
        policy: str = "cache_aware",
        per_worker: int = 512,
        queue_size: int = 100_000,
        request_timeout_s: float = 14400.0,
        failure_threshold: int = 3,
        on_failure: Callable[[Worker, Exception], None] = _nobody,
        repaired: bool = False,
    ) -> None:
        self.workers: dict[str, Worker] = {}
        """Every engine by its address, in the order in which they came."""
        self.on_failure, self.repaired = on_failure, repaired
        self.snapshot: Snapshot | None = None
        """The weights that every engine must have."""
        self.update_lock = asyncio.Lock()
        """Held while weights go to engines, and while one is brought back with them."""
        self.dialect: str | None = None
        """What all engines speak that are not leaving; None: they differ, or there is none."""
        self.places = Places(make_policy(policy), per_worker, queue_size)
        self._dispatch = Dispatch(self.places, request_timeout_s, self._failed)
        self._failure_threshold = failure_threshold
        self._paused: set[Worker] = set()
        self._aborts = Aborts(self._dispatch, self.workers)
        self._change = asyncio.Event()
        self._updates = Updates(self, self._some_ready)
        self.at_close: list[Callable[[], None]] = []
        """Called when it is closed."""
        self.at_change: list[Callable[[], None]] = []
        """Called when an engine came, went, or is in another state."""

    @property
    def aborts_asked(self) -> int:
        """How often `abort` was called."""
        return self._aborts.asked

    # Engines that come and go

    def add(self, engine: RemoteEngine, *, ready: bool = True) -> Worker:
        """One more engine; with `ready` it gets requests at once.

        Raises:
            EngineError: there is one with this address.
        """
        if engine.url in self.workers:
            raise EngineError(f"the pool has an engine at {engine.url} already: remove that first")
        worker = Worker.of(engine, self._failure_threshold)
        self.workers[worker.url] = worker
        if ready:
            worker.state = WorkerState.READY
        self._changed()
        return worker

    async def remove(
        self, url: str, drain: bool = True, timeout_s: float | None = None
    ) -> RemoteEngine:
        """Take an engine out: with `drain` it finishes what it has, or as much as the time allows;
        the rest is sent elsewhere. One that is being given weights stays until it has them, within
        the same time again. Gives the engine back, which stays open and holds no request.

        Raises:
            EngineError: there is none with this address.
        """
        worker = self.worker(url)
        if drain and worker.ready:
            worker.state = WorkerState.DRAINING
            self._changed()
            await _drained(worker, timeout_s)
        if drain:  # Hand to hand, the update would begin anew for all.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s), self.update_lock:
                    pass
        held, worker.removed = worker in self._paused, True
        self._bury(worker, "it was removed")
        if self.workers.get(url) is worker:
            del self.workers[url]
        self._changed()
        if held:  # Nobody else tells it to go on.
            with contextlib.suppress(EngineError):
                await worker.engine.resume()
        return worker.engine

    def worker(self, url: str) -> Worker:
        """The one with this address.

        Raises:
            EngineError: there is none.
        """
        if url not in self.workers:
            known = ", ".join(self.workers) or "none"
            raise EngineError(f"the pool has no engine at {url}; it has {known}")
        return self.workers[url]

    def mark_ready(self, url: str) -> None:
        """The engine reacts and has the weights: it gets requests. See `admit`."""
        worker = self.worker(url)
        worker.breaker.reset()
        worker.busy_until, worker.reason = 0.0, ""
        if worker.state is not WorkerState.DRAINING:
            worker.state = WorkerState.READY
        self._changed()

    def mark_dead(self, url: str, reason: str) -> None:
        """The engine is gone: what it has is sent elsewhere, and nothing that still comes from this
        life of it counts."""
        self._bury(self.worker(url), reason)
        self._changed()

    async def admit(self, url: str) -> None:
        """Bring a started engine in: give it the last snapshot, ask which weights it has, end what
        is left of a pause, and mark it ready; all while no other weights are on their way.

        Raises:
            EngineError: it did not take the weights, or says that it has others, or it is not (or
                no longer) starting or dead as it was.
        """
        await self._updates.admit(url)

    def give_up(self, reason: str) -> None:
        """No engine comes back: whoever waits for one gets an EngineError, as does who comes."""
        self._dispatch.give_up(reason)
        self._changed()

    # Requests

    @property
    def weight_version(self) -> int:
        """That of the last snapshot; 0: there was none."""
        return 0 if self.snapshot is None else self.snapshot.version

    @property
    def num_receivers(self) -> int:
        """Engines that the next `load` is for: hand to hand, all of them must be there."""
        return self._updates.num_receivers

    @property
    def hopeless(self) -> str | None:
        """Why no engine comes back; None: one may."""
        return self._dispatch.hopeless

    @property
    def can_score(self) -> bool:
        """Whether there is an engine that scores."""
        return any(worker.can_score for worker in self.workers.values())

    @property
    def stats(self) -> Stats:
        """Counters of requests."""
        return self._dispatch.stats

    @property
    def in_flight(self) -> int:
        """Requests without an answer, those that wait included."""
        return len(self._dispatch.calls)

    @property
    def waiting(self) -> int:
        """Requests that wait for an engine."""
        return self.places.waiting

    async def run(self, call: Call, attempt: Callable[[Worker], Awaitable[T]]) -> T:
        """See `Dispatch.run`."""
        return await self._dispatch.run(call, attempt)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Answer a request by one of the engines.

        Raises:
            RequestTooLongError: the request can never fit.
            EngineBusyError: the queue is full.
            EngineTimeoutError: no answer within the time.
            EngineError: an engine refused it for good, or engines broke it off too often.
        """
        call = Call(request.prompt_ids, request.session_id, name=request.request_id)

        async def attempt(worker: Worker) -> GenerateResult:
            given = worker.weight_version
            result = await worker.engine.generate(request)
            _check_version(worker, given, result)
            return result

        try:
            return await self.run(call, attempt)
        except Stopped:
            # What an engine made of it is lost with the engine.
            return GenerateResult(
                request.request_id, [], [], FinishReason.ABORT, prompt_tokens=len(call.prompt)
            )

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Score by one of the engines that can.

        Raises:
            EngineError: as `generate`; or no engine scores, or the request was aborted.
        """
        if self.workers and not self.can_score:
            raise EngineError("none of the engines scores tokens that are there already")
        call = Call(request.token_ids, name=request.request_id, scores=True)

        async def attempt(worker: Worker) -> ScoreResult:
            assert isinstance(worker.engine, ScoringEngine), "only such workers suit the call"
            return await worker.engine.score(request)

        try:
            return await self.run(call, attempt)
        except Stopped as error:
            raise EngineError(f"request {request.request_id} was aborted") from error

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all, those of the proxy too). Those that wait end at once,
        engines are told of the others, again and again until they end."""
        await self._aborts.abort(request_ids)

    async def close(self) -> None:
        """End every request, and close every engine's client."""
        self._dispatch.close()
        self._aborts.close()
        for worker in self.workers.values():
            self._updates.forget(worker)
        for close in self.at_close:
            close()
        engines = [worker.engine for worker in self.workers.values()]
        await asyncio.gather(*(engine.close() for engine in engines), return_exceptions=True)

    # Commands to all engines

    async def pause(self) -> None:
        """Hold every request where it is, in all ready engines and in the queue."""
        self.places.paused = True
        ready = self.ready()
        self._paused.update(ready)
        await self._command(ready, "pause", lambda worker: worker.engine.pause())

    async def resume(self) -> None:
        """Go on after `pause`."""
        live = (WorkerState.READY, WorkerState.DRAINING)
        paused = [one for one in self.workers.values() if one in self._paused and one.state in live]
        self._paused.clear()
        try:
            await self._command(paused, "resume", lambda worker: worker.engine.resume())
        finally:
            self.places.paused = False
            self.places.serve()

    async def sleep(self) -> None:
        """Have every ready engine give its memory up, in a pause."""
        await self._command(self.ready(), "sleep", lambda worker: worker.engine.sleep())

    async def wake(self) -> None:
        """Have every ready engine take it again; `load` must follow before `resume`."""
        await self._command(self.ready(), "wake", lambda worker: worker.engine.wake())

    async def load(self, snapshot: Snapshot) -> None:
        """Give every ready engine these weights. One that does not take them is dead; others get
        them with `admit`.

        Raises:
            EngineError: no engine took them, and nobody brings one back that will.
            BrokenUpdateError: hand to hand, it broke off; those that are left wait for another try.
        """
        await self._updates.load(snapshot, self._dispatch.request_timeout_s)

    async def _some_ready(self) -> None:
        """Wait until an engine takes requests.

        Raises:
            EngineError: none will.
        """
        while not self.ready():
            if self._dispatch.hopeless or not self.repaired:
                raise EngineError("nobody brings an engine back")
            await self._change.wait()

    def ready(self) -> list[Worker]:
        """The engines that get requests."""
        return [worker for worker in self.workers.values() if worker.ready]

    async def _command(
        self,
        workers: list[Worker],
        name: str,
        command: Callable[[Worker], Coroutine[Any, Any, None]],
    ) -> dict[Worker, Exception]:
        """Run it at all of them at once; who fails is dead. Gives the failures."""
        epochs = {worker: worker.epoch for worker in workers}
        errors = await command_all(workers, command)
        for worker, error in errors.items():
            if worker.epoch == epochs[worker]:
                self.mark_dead(worker.url, f"{name} failed: {error}")
                self.on_failure(worker, error)
        return errors

    # Inside

    def _bury(self, worker: Worker, reason: str) -> None:
        worker.state, worker.reason = WorkerState.DEAD, reason
        worker.epoch += 1
        worker.empty.set()
        self._paused.discard(worker)
        for call in list(worker.calls):
            call.interrupt(Interrupt.GONE)
        for control in list(worker.controls):
            control.cancel()
        self._updates.forget(worker)
        self.places.policy.forget([worker])

    def _changed(self) -> None:
        dialects = {
            worker.dialect
            for worker in self.workers.values()
            if worker.state is not WorkerState.DRAINING
        }
        self.dialect = dialects.pop() if len(dialects) == 1 else None
        self.places.use(self.workers.values())
        self._change.set()
        self._change = asyncio.Event()
        for told in self.at_change:
            told()

    def _failed(self, worker: Worker, error: EngineError) -> None:
        if isinstance(error, StaleAnswerError) and self.workers.get(worker.url) is worker:
            self.mark_dead(worker.url, str(error))
        self.on_failure(worker, error)


async def _drained(worker: Worker, timeout_s: float | None) -> None:
    """Returns when it has nothing left, or is dead, or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            while worker.in_flight and worker.state is WorkerState.DRAINING:
                worker.empty.clear()
                await worker.empty.wait()
    except TimeoutError:
        log.warning("%s: %d requests are sent elsewhere", worker.url, worker.in_flight)


def _check_version(worker: Worker, given: int | None, result: GenerateResult) -> None:
    """Refuse what was made with older weights than the engine was given before it was asked."""
    spans = result.version_spans
    if given is not None and spans and spans[-1].weight_version < given:
        raise StaleAnswerError(
            f"{worker.url} was given weights of version {given} and answered with those of version "
            f"{spans[-1].weight_version}"
        )
