"""One engine as the pool keeps it, and one request on its way to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dovetail.router.balancer.breaker import Breaker
from dovetail.types.ports import RemoteEngine, ScoringEngine


class WorkerState(StrEnum):
    """Whether an engine gets requests."""

    STARTING = "starting"
    READY = "ready"
    """The only state in which it gets some."""
    DEAD = "dead"
    DRAINING = "draining"
    """It finishes what it has, and leaves."""


class Interrupt(StrEnum):
    """Why the pool stops a request that has no answer yet."""

    GONE = "gone"
    """Its engine died."""
    TIMEOUT = "timeout"
    ABORT = "abort"
    CLIENT = "client"
    """Nobody waits for the answer any more."""


class Call:
    """One request on its way: what a policy reads of it, and where it is.

    The pool stops one by cancelling its task, as `asyncio.timeout` does: `why` tells such a
    cancellation from one that comes from outside.
    """

    __slots__ = (
        "_cancelled",
        "_cancelling",
        "aborted",
        "admitted",
        "attempts",
        "avoid",
        "begun",
        "deadline",
        "dialect",
        "key",
        "name",
        "prompt",
        "scores",
        "task",
        "why",
        "worker",
    )

    def __init__(
        self,
        prompt: Sequence[int] | bytes = (),
        key: str | None = None,
        *,
        name: str = "",
        dialect: str | None = None,
        scores: bool = False,
    ) -> None:
        self.prompt, self.key = prompt, key
        self.name = name
        """The id under which the engine knows it; empty: none that we know."""
        self.dialect = dialect
        """Only engines that speak it will do; None: any."""
        self.scores = scores
        """Only engines that score will do."""
        self.admitted = False
        """It had a slot once: a full queue does not refuse it."""
        self.attempts = 0
        """How often it was sent."""
        self.avoid: set[Worker] = set()
        """Where it failed lately."""
        self.aborted = False
        """Nobody wants its answer to be made again."""
        self.deadline = 0.0
        """When its time is over, by the loop's clock."""
        self.begun = False
        """A part of the answer is with the client: it can't be sent again."""
        self.worker: Worker | None = None
        self.why: Interrupt | None = None
        self.task: asyncio.Task[object] | None = None
        self._cancelled = False
        self._cancelling = 0

    def enter(self) -> None:
        """The running task is the one that waits for the answer."""
        self.task = asyncio.current_task()
        assert self.task is not None, "calls are made in tasks"
        self._cancelling = self.task.cancelling()

    def interrupt(self, why: Interrupt) -> None:
        """Wake its task with a cancellation of ours; the first reason counts."""
        if self.why is not None or self.task is None:
            return
        self.why = why
        # A task that runs already looks at the reason as soon as it is done.
        if self.task is not asyncio.current_task():
            self._cancelled = self.task.cancel()

    def taken(self) -> Interrupt | None:
        """After a cancellation, or an answer in spite of one: our reason, which counts as dealt
        with; None: it came from outside too, or there was none."""
        why, self.why = self.why, None
        if not self._cancelled:
            return why
        self._cancelled = False
        assert self.task is not None, "what was cancelled is a task"
        return why if self.task.uncancel() <= self._cancelling else None


@dataclass(eq=False, slots=True)
class Worker:
    """One engine of a pool."""

    url: str
    dialect: str
    engine: RemoteEngine
    breaker: Breaker
    state: WorkerState = WorkerState.STARTING
    reason: str = ""
    """Why it is dead."""
    removed: bool = False
    """It is no longer in the pool."""
    epoch: int = 0
    """One more with each death: answers from an earlier one count no more."""
    weight_version: int | None = None
    """Of the weights that it was given last."""
    in_flight: int = 0
    answered: int = 0
    failures: int = 0
    """Requests that it broke off, all in all."""
    busy_until: float = 0.0
    """It asked to be left alone until then, by the loop's clock."""
    calls: dict[Call, None] = field(default_factory=dict)
    """What it is busy with, first sent first, without what waits for its slot to be used."""
    controls: set[asyncio.Task[None]] = field(default_factory=set)
    """Commands under way."""
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has finished everything while draining."""
    can_score: bool = False

    @classmethod
    def of(cls, engine: RemoteEngine, failure_threshold: int) -> Worker:
        """For this engine, starting."""
        worker = cls(engine.url, engine.dialect, engine, Breaker(failure_threshold))
        worker.can_score = isinstance(engine, ScoringEngine)
        return worker

    @property
    def ready(self) -> bool:
        """Whether it gets requests."""
        return self.state is WorkerState.READY
