"""Engines that answer when a test says so, and a loop whose clock jumps to what comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dovetail.router.balancer.pool import Pool
from dovetail.types import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    ScoreRequest,
    ScoreResult,
    Snapshot,
)
from dovetail.types.calls import VersionSpan

T = TypeVar("T")


@dataclass
class Asked:
    """A request that an engine has."""

    request: GenerateRequest
    answer: asyncio.Future[GenerateResult]

    def finish(self, text: str = "", version: int | None = None) -> None:
        """Answer it."""
        self.answer.set_result(result(self.request, text, version))


@dataclass
class HeldEngine:
    """Holds every request until its answer is set."""

    url: str
    dialect: str = "sglang"
    token: str | None = None
    stubborn: bool = False
    """Finishes also what was cancelled: the answer comes late."""
    asked: list[Asked] = field(default_factory=list)
    aborted: list[list[str] | None] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    version: int | None = None
    failing: Exception | None = None
    """What commands raise."""
    closed: bool = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        asked = Asked(request, asyncio.get_running_loop().create_future())
        self.asked.append(asked)
        try:
            return await asyncio.shield(asked.answer)
        except asyncio.CancelledError:
            if not self.stubborn:
                raise
            return await asked.answer
        finally:
            self.asked.remove(asked)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self.aborted.append(None if request_ids is None else list(request_ids))
        for asked in list(self.asked):
            named = request_ids is None or asked.request.request_id in request_ids
            if named and not asked.answer.done():
                asked.answer.set_result(result(asked.request, finish=FinishReason.ABORT))

    async def close(self) -> None:
        self.closed = True

    async def healthy(self, timeout_s: float) -> bool:
        return True

    async def weight_version(self) -> int | None:
        return self.version

    async def pause(self) -> None:
        self._say("pause")

    async def resume(self) -> None:
        self._say("resume")

    async def load_snapshot(self, snapshot: Snapshot) -> None:
        self._say(f"load {snapshot.version}")
        self.version = snapshot.version

    async def sleep(self) -> None:
        self._say("sleep")

    async def wake(self) -> None:
        self._say("wake")

    def _say(self, what: str) -> None:
        if self.failing is not None:
            raise self.failing
        self.said.append(what)


class ScoringHeldEngine(HeldEngine):
    """One that scores, at once."""

    async def score(self, request: ScoreRequest) -> ScoreResult:
        return ScoreResult([-1.0] * (len(request.token_ids) - request.start), [])


def request(name: str, prompt: Sequence[int] = (1, 2, 3), session: str | None = None) -> Any:
    return GenerateRequest(name, tuple(prompt), SamplingParams(), session_id=session)


def result(
    request: GenerateRequest,
    text: str = "",
    version: int | None = None,
    finish: FinishReason = FinishReason.STOP,
) -> GenerateResult:
    spans = () if version is None else (VersionSpan(version, 0, 1),)
    return GenerateResult(request.request_id, [7], [-0.5], finish, text, spans)


def snapshot(version: int) -> Snapshot:
    return Snapshot(version, Path(f"/nowhere/{version}"), 0)


async def settled(turns: int = 20) -> None:
    """Let everything run that can."""
    for _ in range(turns):
        await asyncio.sleep(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """Nobody waits on it: when nothing can run, its clock is the time of the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> Any:
            events = select(0)
            if not events and timeout:
                self.now += timeout
            return events

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a jumping loop."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)


def ask(pool: Pool, name: str, **of_request: object) -> asyncio.Task[GenerateResult]:
    return asyncio.get_running_loop().create_task(
        pool.generate(request(name, **of_request))  # type: ignore[arg-type]
    )


def engines(pool: Pool, count: int) -> list[HeldEngine]:
    made = [HeldEngine(f"http://{name}:1") for name in "abcdef"[:count]]
    for engine in made:
        pool.add(engine)
    return made


def assert_idle(pool: Pool) -> None:
    assert pool.in_flight == pool.waiting == 0
    assert all(not worker.in_flight and not worker.calls for worker in pool.workers.values())
