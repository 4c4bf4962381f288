"""Whatever happens to engines, and in whatever order: every request ends exactly once, with the
answer of an engine's present life, and no slot is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from dovetail.router.balancer.dispatch import MOST_ATTEMPTS
from dovetail.router.balancer.pick import POLICIES
from dovetail.router.balancer.pool import Pool
from dovetail.types import (
    EngineBusyError,
    EngineError,
    EngineGoneError,
    EngineTimeoutError,
    FinishReason,
    GenerateResult,
)
from tests.unit.router.fakes import Asked, HeldEngine, JumpingLoop, request, settled, snapshot

PER_WORKER, QUEUE, TIMEOUT_S = 3, 6, 50.0


class Recorded(HeldEngine):
    """Says which life of which engine an answer is of."""

    life = 0

    def answer(self, asked: Asked, life: int) -> None:
        version = self.version if life == self.life else None
        asked.finish(f"{self.url} {life} {asked.request.request_id}", version)


class PoolMachine(RuleBasedStateMachine):
    """Requests and engines, and what may befall them."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = JumpingLoop()
        self.tasks: dict[str, asyncio.Task[GenerateResult]] = {}
        self.ended: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.aborted: set[str] = set()
        self.engines: dict[str, Recorded] = {}
        self.zombies: list[tuple[Recorded, int, Asked]] = []
        self.number = 0
        self.version = 0
        self.paused = False

    def do(self, act: Callable[[], object]) -> None:
        """On the loop, as everything that the pool does."""

        async def acting() -> None:
            act()

        self.loop.run_until_complete(acting())

    def turn(self) -> None:
        self.loop.run_until_complete(settled(12))
        for name, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[name]
                self.end(name, task)

    def end(self, name: str, task: asyncio.Task[GenerateResult]) -> None:
        assert name not in self.ended, "answered twice"
        if task.cancelled():
            assert name in self.cancelled
            self.ended[name] = "cancelled"
        elif (error := task.exception()) is not None:
            assert isinstance(error, EngineError), error
            self.ended[name] = type(error).__name__
        else:
            self.ended[name] = "answered"
            self.check_answer(name, task.result())

    def check_answer(self, name: str, result: GenerateResult) -> None:
        assert result.request_id == name
        if result.finish_reason is FinishReason.ABORT:
            assert name in self.aborted
            return
        url, life, of = result.text.split(" ")
        assert of == name, "the answer to another request"
        engine = self.engines.get(url)
        assert engine is None or int(life) == engine.life, "the answer of an earlier life"

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, policy: str) -> None:
        self.pool = Pool(
            policy=policy,
            per_worker=PER_WORKER,
            queue_size=QUEUE,
            request_timeout_s=TIMEOUT_S,
            failure_threshold=2,
            repaired=True,
        )

    @rule(stubborn=st.booleans())
    def add(self, stubborn: bool) -> None:
        if len(self.engines) < 4:
            self.number += 1
            engine = Recorded(f"http://e{self.number}:1", stubborn=stubborn, version=self.version)
            self.engines[engine.url] = engine
            self.do(lambda: self.pool.add(engine))
            self.turn()

    @rule(session=st.sampled_from([None, "s", "t"]), prompt=st.integers(0, 2))
    def submit(self, session: str | None, prompt: int) -> None:
        self.number += 1
        name = f"r{self.number}"
        asked = request(name, prompt=[prompt] * 40, session=session)
        self.tasks[name] = self.loop.create_task(self.pool.generate(asked))
        self.turn()

    def some_asked(self, data: st.DataObject) -> tuple[Recorded, Asked] | None:
        every = [
            (engine, asked)
            for engine in self.engines.values()
            for asked in engine.asked
            if not asked.answer.done() and not self.is_zombie(asked)
        ]
        return data.draw(st.sampled_from(every)) if every else None

    def is_zombie(self, asked: Asked) -> bool:
        return any(asked is other for _, _, other in self.zombies)

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if found := self.some_asked(data):
            engine, asked = found
            engine.answer(asked, engine.life)
            self.turn()

    @rule(data=st.data(), error=st.sampled_from([EngineGoneError, EngineBusyError, EngineError]))
    def fail(self, data: st.DataObject, error: type[EngineError]) -> None:
        if found := self.some_asked(data):
            found[1].answer.set_exception(error("injected"))
            self.turn()

    def some_engine(self, data: st.DataObject) -> Recorded:
        return data.draw(st.sampled_from(list(self.engines.values())))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), answers_too=st.booleans())
    def kill(self, data: st.DataObject, answers_too: bool) -> None:
        engine = self.some_engine(data)
        waiting = [asked for asked in engine.asked if not asked.answer.done()]

        def kill() -> None:
            if answers_too and waiting and not self.is_zombie(waiting[0]):
                # In the same moment.
                engine.answer(waiting[0], engine.life)
            self.pool.mark_dead(engine.url, "killed")

        self.do(kill)
        if engine.stubborn:
            self.zombies += [(engine, engine.life, asked) for asked in waiting]
        engine.life += 1
        self.turn()

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def late_answer(self, data: st.DataObject) -> None:
        engine, life, asked = self.zombies.pop(data.draw(st.integers(0, len(self.zombies) - 1)))
        if not asked.answer.done():
            engine.answer(asked, life)
            self.turn()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def repair(self, data: st.DataObject) -> None:
        engine = self.some_engine(data)
        if self.pool.workers[engine.url].state == "dead":
            self.loop.run_until_complete(self.pool.admit(engine.url))
            self.turn()

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), drain=st.booleans())
    def remove(self, data: st.DataObject, drain: bool) -> None:
        engine = self.some_engine(data)
        del self.engines[engine.url]
        self.zombies += [(engine, engine.life, asked) for asked in engine.asked]
        removing = self.pool.remove(engine.url, drain, timeout_s=1.0)
        self.loop.run_until_complete(removing)
        engine.life += 1
        self.turn()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tasks)))
        self.cancelled.add(name)
        self.tasks[name].cancel()
        self.turn()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), everything=st.booleans())
    def abort(self, data: st.DataObject, everything: bool) -> None:
        names = sorted(self.tasks)
        if not everything:
            names = [data.draw(st.sampled_from(names))]
        self.aborted |= set(names)
        self.loop.run_until_complete(self.pool.abort(None if everything else names))
        self.turn()

    @rule()
    def update(self) -> None:
        async def update() -> None:
            await self.pool.pause()
            await self.pool.load(snapshot(self.version))
            await self.pool.resume()

        if self.pool.ready():
            self.version += 1
            self.loop.run_until_complete(update())
            self.turn()

    @rule(seconds=st.sampled_from([0.1, 1.5, 10.0]))
    def wait(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.turn()

    @invariant()
    def slots_are_counted(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.in_flight == len(self.tasks)
        assert self.pool.waiting <= QUEUE + PER_WORKER * 8
        for worker in self.pool.workers.values():
            assert 0 <= worker.in_flight <= PER_WORKER
            assert len(worker.calls) <= worker.in_flight

    def teardown(self) -> None:
        """With a sound engine in the end, whatever is left is answered."""
        if hasattr(self, "pool"):
            sound = Recorded("http://sound:1", version=self.version)
            self.engines[sound.url] = sound
            self.do(lambda: self.pool.add(sound))
            for _ in range(100):
                self.turn()
                for engine in self.engines.values():
                    for asked in [one for one in engine.asked if not one.answer.done()]:
                        engine.answer(asked, engine.life)
                for engine, life, asked in self.zombies:
                    if not asked.answer.done():
                        engine.answer(asked, life)
                self.loop.run_until_complete(asyncio.sleep(1.0))
            self.turn()
            self.check_end()
        self.loop.close()

    def check_end(self) -> None:
        assert not self.tasks
        assert self.pool.in_flight == self.pool.waiting == 0
        assert all(worker.in_flight == 0 for worker in self.pool.workers.values())
        stats = self.pool.stats
        ends = list(self.ended.values())
        assert stats.requests == len(ends)
        assert stats.refused + stats.timeouts <= stats.requests
        assert ends.count(EngineTimeoutError.__name__) == stats.timeouts
        assert stats.resent <= MOST_ATTEMPTS * stats.requests + 4 * len(self.cancelled)
        left = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        self.loop.run_until_complete(self.pool.close())
        assert not left


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
