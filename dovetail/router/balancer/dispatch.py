"""One request's way to its answer: a slot, an attempt, and again elsewhere if the engine is gone.

    run() --slot (places.py)--> attempt --answer--> fence --> the caller
      ^                            |                  |
      |           gone, busy, dead |                  | of an engine's earlier life
      +---- again, elsewhere <-----+<-----------------+

Every call ends in exactly one of: an answer, an error, `Stopped`, or the caller's own cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dovetail.router.balancer.places import Places
from dovetail.router.balancer.worker import Call, Interrupt, Worker, WorkerState
from dovetail.types.errors import (
    EngineBusyError,
    EngineError,
    EngineGoneError,
    EngineTimeoutError,
)

T = TypeVar("T")

MOST_ATTEMPTS = 16
"""A request that so many engines broke off is what breaks them."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
"""Between two rounds of a request that every engine failed."""
LONGEST_REST_S = 10.0
"""An engine that says it is busy is left alone for as long as it asks, but no longer than this."""


@dataclass
class Stats:
    """Counters of requests, since the pool was made."""

    requests: int = 0
    answered: int = 0
    resent: int = 0
    """Sent once more, because an engine was gone or busy."""
    fenced: int = 0
    """Answers of an engine's earlier life, or of older weights, that were dropped."""
    failures: int = 0
    """Broken off by an engine."""
    refused: int = 0
    """The queue was full."""
    timeouts: int = 0
    stopped: int = 0
    """Aborted, or their client went away."""


class Stopped(Exception):
    """The pool ended a request without an answer, as it was asked to."""

    def __init__(self, why: Interrupt) -> None:
        super().__init__(why)
        self.why = why


class StaleAnswerError(EngineGoneError):
    """An engine answered with older weights than those that it was given."""


@dataclass(frozen=True, slots=True)
class _Again:
    """The call needs another attempt."""

    error: EngineError


_CANCELLED = object()
_GONE_STATES = (WorkerState.DEAD, WorkerState.STARTING)


class Dispatch:
    """Runs calls.

    Args:
        on_failure: told of each engine that broke a request off.
    """

    def __init__(
        self,
        places: Places,
        request_timeout_s: float,
        on_failure: Callable[[Worker, EngineError], None],
    ) -> None:
        self.places, self.request_timeout_s = places, request_timeout_s
        self.stats = Stats()
        self.hopeless: str | None = None
        """Why no engine comes back."""
        self.closed = False
        self.calls: dict[Call, None] = {}
        """All that have no answer yet."""
        self.unnamed = 0
        """Those of them whose name only their engine knows."""
        self._on_failure = on_failure
        self._by_name: dict[str, list[Call]] = {}

    def named(self, name: str) -> list[Call]:
        """Calls that engines know by this name."""
        return self._by_name.get(name, [])

    async def run(self, call: Call, attempt: Callable[[Worker], Awaitable[T]]) -> T:
        """The answer of `attempt` at an engine, made again elsewhere when that is gone.

        Raises:
            Stopped: the request was aborted, or its client is gone, or the pool was closed.
            EngineBusyError: the queue is full.
            EngineTimeoutError: no answer within the time.
            EngineGoneError: engines broke it off too often, or none comes back, or a part of the
                answer was already passed on.
            EngineError: an engine refused it for good.
        """
        if self.closed:
            raise Stopped(Interrupt.ABORT)
        self._enlist(call)
        loop = asyncio.get_running_loop()
        call.deadline = loop.time() + self.request_timeout_s
        timer = loop.call_at(call.deadline, call.interrupt, Interrupt.TIMEOUT)
        try:
            while True:
                worker = self.places.take(call) or await self._slot(call)
                call.admitted = True
                answer = await self._attempt(call, worker, attempt)
                if not isinstance(answer, _Again):
                    return answer
                await self._before_again(call, answer.error)
        finally:
            timer.cancel()
            self._delist(call)

    def give_up(self, reason: str) -> None:
        """No engine comes back: calls without one end with an EngineGoneError, now and later."""
        self.hopeless = reason
        for call in self.calls:
            if call.worker is None:
                call.interrupt(Interrupt.GONE)

    def close(self) -> None:
        """Stop every call, and take no more."""
        self.closed = True
        for call in self.calls:
            call.aborted = True
            call.interrupt(Interrupt.ABORT)

    def _enlist(self, call: Call) -> None:
        call.enter()
        self.stats.requests += 1
        self.calls[call] = None
        if call.name:
            self._by_name.setdefault(call.name, []).append(call)
        else:
            self.unnamed += 1

    def _delist(self, call: Call) -> None:
        del self.calls[call]
        if not call.name:
            self.unnamed -= 1
        else:
            same = self._by_name[call.name]
            same.remove(call)
            if not same:
                del self._by_name[call.name]

    async def _slot(self, call: Call) -> Worker:
        if self.hopeless is not None:
            raise EngineGoneError(self.hopeless)
        try:
            return await self.places.wait(call, again=call.admitted)
        except asyncio.CancelledError:
            self._raise_for(call, call.taken())
            raise
        except EngineBusyError:
            self.stats.refused += 1
            raise

    async def _attempt(
        self, call: Call, worker: Worker, attempt: Callable[[Worker], Awaitable[T]]
    ) -> T | _Again:
        try:
            if worker.state in _GONE_STATES:
                # It died after it gave the slot and before the call woke.
                return _Again(EngineGoneError(f"{worker.url} is gone: {worker.reason}"))
            epoch = worker.epoch
            outcome = await self._at(call, worker, attempt)
            return self._judge(call, worker, epoch, outcome)
        finally:
            # Only now: whoever gets the slot must find what this call taught about the engine.
            self.places.give_back(worker)

    async def _at(
        self, call: Call, worker: Worker, attempt: Callable[[Worker], Awaitable[T]]
    ) -> T | EngineError | object:
        """What came of it."""
        call.worker = worker
        call.attempts += 1
        worker.calls[call] = None
        try:
            return await attempt(worker)
        except EngineError as error:
            return error
        except asyncio.CancelledError:
            worker.breaker.nothing()
            return _CANCELLED
        finally:
            call.worker = None
            del worker.calls[call]

    def _judge(
        self, call: Call, worker: Worker, epoch: int, outcome: T | EngineError | object
    ) -> T | _Again:
        """What an outcome means for the call, if the worker has begun another life by now."""
        why = call.taken()
        if outcome is _CANCELLED and why is None:
            raise asyncio.CancelledError
        if why is not Interrupt.GONE:
            self._raise_for(call, why)
        if why is None and worker.epoch == epoch:
            return self._learn(call, worker, outcome)
        self.stats.fenced += outcome is not _CANCELLED and not isinstance(outcome, EngineError)
        if worker.removed:
            # Not the call's fault, for certain.
            call.attempts -= 1
        return self._again(call, EngineGoneError(f"{worker.url} is gone: {worker.reason}"))

    def _learn(self, call: Call, worker: Worker, outcome: T | EngineError | object) -> T | _Again:
        """What an outcome in the worker's present life means for both."""
        if isinstance(outcome, EngineBusyError):
            now = asyncio.get_running_loop().time()
            worker.busy_until = now + min(outcome.retry_after_s, LONGEST_REST_S)
            worker.breaker.success()
            call.attempts -= 1
            return self._again(call, outcome)
        if isinstance(outcome, EngineGoneError):
            now = asyncio.get_running_loop().time()
            worker.breaker.failure(now)
            worker.failures += 1
            self.stats.failures += 1
            self.stats.fenced += isinstance(outcome, StaleAnswerError)
            call.avoid.add(worker)
            self._on_failure(worker, outcome)
            return self._again(call, outcome)
        worker.breaker.success()
        if isinstance(outcome, EngineError):
            raise outcome
        worker.answered += 1
        self.stats.answered += 1
        return outcome  # type: ignore[return-value]

    def _again(self, call: Call, error: EngineError) -> _Again:
        """Sent once more, if that can be.

        Raises:
            Stopped, EngineGoneError: it can't.
        """
        if call.begun:
            raise EngineGoneError(f"{error}; a part of the answer was passed on already") from error
        if call.aborted:
            self._raise_for(call, Interrupt.ABORT)
        if call.attempts >= MOST_ATTEMPTS:
            raise EngineGoneError(
                f"the request was sent {call.attempts} times and broken off each time, the last "
                f"time because: {error}"
            ) from error
        self.stats.resent += 1
        return _Again(error)

    async def _before_again(self, call: Call, error: EngineError) -> None:
        """Wait a little if every engine failed it, so that no loop runs hot."""
        if asyncio.get_running_loop().time() >= call.deadline:
            self._raise_for(call, Interrupt.TIMEOUT)
        if not call.avoid or not self.places.all_in(call.avoid):
            return
        call.avoid.clear()
        pause_s = min(FIRST_PAUSE_S * 2 ** (call.attempts - 1), LONGEST_PAUSE_S)
        try:
            await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            self._raise_for(call, call.taken())
            raise

    def _raise_for(self, call: Call, why: Interrupt | None) -> None:
        """The error for a reason of ours, None: nothing.

        Raises:
            Stopped, EngineGoneError, EngineTimeoutError: as the reason is.
        """
        if why is None:
            return
        if why is Interrupt.TIMEOUT:
            self.stats.timeouts += 1
            raise EngineTimeoutError(
                f"no answer within {self.request_timeout_s:g} s, {call.attempts} attempts and "
                "waiting included (--router-request-timeout-s, "
                "TOML: router.router_request_timeout_s)"
            )
        if why is Interrupt.GONE:
            raise EngineGoneError(self.hopeless or "every engine is gone")
        self.stats.stopped += 1
        raise Stopped(why)
