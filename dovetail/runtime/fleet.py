"""The engines of a run that live in other processes, as one engine.

    run's loop --OnLoop--> fleet's loop, a thread of its own
                             Pool ------ requests ------> engines, each under a keeper
                             Supervisor - looks, repair -> (process | attached)
                             SnapshotStore - weights ---> /dev/shm or a directory

`start` starts what is to be started, all at once, and waits until every engine answers; `close`
leaves nothing behind. A run that is killed leaves nothing either: see `engines/process.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.engines import identify
from dovetail.engines.launch import LaunchSpec
from dovetail.router.balancer.pool import Pool
from dovetail.router.balancer.worker import Worker
from dovetail.runtime.health import GRACE_S, HealthSettings, Member, Supervisor
from dovetail.runtime.home import Home, Port, ThisMachine
from dovetail.runtime.on_loop import LoopThread, OnLoop
from dovetail.runtime.starting import Say, tell, what_begins
from dovetail.transport.sender import Sender
from dovetail.types.calls import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult
from dovetail.types.errors import EngineError, WeightMismatchError
from dovetail.types.ports import RemoteEngine
from dovetail.types.weights import Snapshot
from dovetail.weights.check import Holder
from dovetail.weights.publish import deliver

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine of a fleet: one to start has `launch`, one that runs already has `url`."""

    name: str
    """As messages call it, e.g. `engine 0 (vllm)`."""
    client: Callable[[str], RemoteEngine]
    """Makes what speaks to the engine at an address; called on the fleet's loop."""
    launch: Callable[[int], LaunchSpec] | None = None
    """From the port that it shall listen on to how it is started."""
    url: str | None = None
    home: Callable[[], Home] = ThisMachine
    """Asked when the engine is to be started."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """See `router.balancer.pool.Pool`."""

    policy: str = "cache_aware"
    per_worker: int = 512
    queue_size: int = 100_000
    request_timeout_s: float = 14400.0
    failure_threshold: int = 3


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What became of one engine."""

    name: str
    url: str
    answered: int
    restarts: int
    weight_version: int | None
    ready: bool
    left: bool = False
    """It was taken out while the run went on."""


class Fleet:
    """Starts engines or attaches to them, keeps them going, and gives them weights.

    Used from the run's thread; `engine` is what the run's loop uses.

    Args:
        specs: at least one.
        store: makes what carries weights to them; None: nothing is ever published.
        connect: makes what speaks to an engine that joins later, from its address and what it
            speaks (None: as the others).
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        *,
        pool: PoolSettings | None = None,
        health: HealthSettings | None = None,
        store: Callable[[], Sender] | None = None,
        connect: Callable[[str, str | None], RemoteEngine] | None = None,
    ) -> None:
        assert specs, "a fleet has engines"
        self.specs = list(specs)
        own, self._health = pool or PoolSettings(), health or HealthSettings()
        self.pool = Pool(
            policy=own.policy,
            per_worker=own.per_worker,
            queue_size=own.queue_size,
            request_timeout_s=own.request_timeout_s,
            failure_threshold=own.failure_threshold,
            repaired=self._health.repairs,
        )
        """The engines as one; to be used on the loop of `thread`. Empty until they have started."""
        self._make_store, self._connect = store, connect
        self._store: Sender | None = None
        self._thread: LoopThread | None = None
        self._far: FarFleet | None = None
        self.engine = OnLoop(self)

    async def connect(self, url: str, dialect: str | None) -> RemoteEngine:
        """What speaks to an engine that joins while the fleet runs; the pool gets it next.

        Raises:
            EngineError: this fleet takes none, or none that speaks so.
        """
        if self._connect is None:
            raise EngineError("this fleet takes no engines from outside")
        engine = self._connect(url, dialect)
        found = await identify.identify(url, engine.token, self._health.timeout_s)
        if dialect is None and found.dialect not in (None, engine.dialect):
            await engine.close()
            engine = self._connect(url, found.dialect)
        if unfit := found.stranger(url, engine.dialect):
            await engine.close()
            raise EngineError(unfit)
        return engine

    async def start(self, log_dir: Path, say: Say = lambda text: None) -> None:
        """Start, or reach, every engine; each one that is started writes a log in `log_dir`.

        Args:
            say: called with what is being done, and every now and then with who is waited for;
                also from the fleet's thread.

        Raises:
            EngineError: one does not come up; what was started is ended.
            ConfigError: the weights have no place.
        """
        self._thread = LoopThread("engines")
        try:
            self._store = None if self._make_store is None else self._make_store()
            self._far = FarFleet(self.pool, self._health, self._store)
            say(what_begins(self.specs, log_dir))
            await self._thread.hop(self._far.start(self.specs, log_dir, say))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every engine that was started; the calling thread waits. A second call does
        nothing."""
        if self._thread is not None and self._far is not None:
            self._thread.wait_for(self._far.close())
        self.ended()

    def ended(self) -> None:
        """Let go of what is left when the engines are closed."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        if self._store is not None:
            self._store.close()

    def sleep(self) -> None:
        """Have all engines give their memory up; requests wait. Nothing before they have started.
        The calling thread waits."""
        if self.started:
            self.thread.wait_for(self.far.sleep())

    def wake(self) -> None:
        """Have them take it again; requests wait for the next weights."""
        if self.started:
            self.thread.wait_for(self.far.wake())

    def reload(self) -> None:
        """Give them the last weights again, and let requests go on."""
        if self.started:
            self.thread.wait_for(self.far.reload())

    @property
    def started(self) -> bool:
        """Whether the other loop is there."""
        return self._thread is not None and self._far is not None

    @property
    def thread(self) -> LoopThread:
        """The thread whose loop the engines are spoken to on."""
        if self._thread is None:
            raise EngineError("the engines are not started, or closed already")
        return self._thread

    @property
    def far(self) -> FarFleet:
        """What lives on that loop."""
        if self._far is None:
            raise EngineError("the engines are not started")
        return self._far

    def facts(self) -> list[EngineFacts]:
        """What became of each engine so far."""
        return [] if self._far is None else self._far.facts()

    def metrics(self) -> dict[str, float]:
        """`engines/...`: counters since the start; `time/weight_update_s`: of the last update."""
        return {} if self._far is None else self._far.metrics()


class FarFleet:
    """The part of a fleet that lives on its loop. Implements `runtime.on_loop.Far`."""

    def __init__(self, pool: Pool, health: HealthSettings, store: Sender | None) -> None:
        self.pool, self._health, self._store = pool, health, store
        self.members: list[Member] = []
        self._supervisor = Supervisor(pool, health, self._end)
        pool.on_failure = self._supervisor.failed
        self._ports: list[Port] = []
        self._failure: EngineError | None = None
        self._update_s = self._update_bytes = 0.0

    async def start(self, specs: Sequence[EngineSpec], log_dir: Path, say: Say) -> None:
        """As `Fleet.start`."""
        self.members = [self._member(spec, log_dir) for spec in specs]
        own = self._health
        starts = [
            asyncio.ensure_future(
                one.start(own.start_timeout_s, own.timeout_s, patient=own.waits_for_attached)
            )
            for one in self.members
        ]
        started = dict(zip(starts, self.members, strict=True))
        teller = asyncio.ensure_future(tell(started, own.start_timeout_s, say))
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        finally:
            teller.cancel()
        for member in self.members:
            self.pool.add(member.engine)
        self._supervisor.start(self.members)

    async def close(self) -> None:
        """End the requests, then the engines that were started."""
        await self._supervisor.close()
        await self.pool.close()
        ends = [one.process.terminate(GRACE_S) for one in self.members if one.process is not None]
        await asyncio.gather(*ends)
        await asyncio.gather(*(one.engine.close() for one in self.members))
        for port in self._ports:
            port.close()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """As `Engine.generate`."""
        self._check()
        return await self.pool.generate(request)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """As `ScoringEngine.score`."""
        self._check()
        return await self.pool.score(request)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """As `Engine.abort`."""
        await self.pool.abort(request_ids)

    async def pause(self) -> None:
        """As `EngineControl.pause`."""
        self._check()
        await self.pool.pause()

    async def resume(self) -> None:
        """As `EngineControl.resume`."""
        await self.pool.resume()

    async def sleep(self) -> None:
        """As `Fleet.sleep`."""
        await self.pool.pause()
        await self.pool.sleep()

    async def wake(self) -> None:
        """As `Fleet.wake`."""
        await self.pool.wake()

    async def reload(self) -> None:
        """As `Fleet.reload`."""
        if self.pool.snapshot is not None:
            await self.pool.load(self.pool.snapshot)
        await self.pool.resume()

    async def receive_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]] | None
    ) -> None:
        """As `weights.publish.deliver`: sent once, for all engines.

        Raises:
            EngineError: they can't be sent, or no engine takes them, or one holds others.
        """
        assert tensors is not None and self._store is not None, "nothing is shared with a process"
        self._check()
        started = time.perf_counter()
        try:
            snapshot = await deliver(self._store, self, version, tensors)
        except WeightMismatchError as error:
            self._end(error)
            raise
        self._update_s = time.perf_counter() - started
        self._update_bytes = float(snapshot.num_bytes)

    @property
    def num_receivers(self) -> int:
        """As `weights.publish.Receivers`."""
        return self.pool.num_receivers

    async def load(self, snapshot: Snapshot) -> None:
        """As `weights.publish.Receivers`."""
        await self.pool.load(snapshot)

    def holders(self) -> list[Holder]:
        """As `weights.publish.Receivers`; those that can't say what they hold are none."""
        engines = [worker.engine for worker in self.pool.ready()]
        return [engine for engine in engines if isinstance(engine, Holder)]

    @property
    def weight_version(self) -> int:
        """Of the weights that were published last; 0: none were."""
        return self.pool.weight_version

    def facts(self) -> list[EngineFacts]:
        """As `Fleet.facts`; from any thread."""
        return [
            _facts(one, one.worker) for one in list(self._supervisor.met) if one.worker is not None
        ]

    def metrics(self) -> dict[str, float]:
        """As `Fleet.metrics`; from any thread."""
        facts, stats = self.facts(), self.pool.stats
        found = {
            "engines/ready": sum(one.ready for one in facts),
            "engines/restarts": sum(one.restarts for one in facts),
            "engines/resent_requests": stats.resent,
            "engines/fenced_answers": stats.fenced,
            "engines/weight_update_bytes": self._update_bytes,
            "time/weight_update_s": self._update_s,
        }
        for number, one in enumerate(facts):
            if one.left:
                continue
            found[f"engines/{number}/answered"] = one.answered
            if one.weight_version is not None:
                found[f"engines/{number}/weight_version"] = one.weight_version
        return {name: float(value) for name, value in found.items()}

    def _member(self, spec: EngineSpec, log_dir: Path) -> Member:
        if spec.launch is None:
            assert spec.url is not None, "an engine that nobody starts has an address"
            return Member(spec.name, spec.client(spec.url))
        home = spec.home()
        self._ports.append(port := home.reserve())
        how = spec.launch(port.number)
        log_file = log_dir / f"{spec.name.partition(' (')[0].replace(' ', '_')}.log"
        process = home.server(how.argv, log_file=log_file, name=spec.name, env=how.env)
        return Member(spec.name, spec.client(port.url), process)

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure

    def _end(self, error: EngineError) -> None:
        """The run can't go on without what is lost."""
        log.error("%s", error)
        self._failure = self._failure or error
        self.pool.give_up(str(error))


def _facts(member: Member, worker: Worker) -> EngineFacts:
    return EngineFacts(
        name=member.name,
        url=worker.url,
        answered=worker.answered,
        restarts=member.restarts,
        weight_version=worker.weight_version,
        ready=worker.ready,
        left=worker.removed,
    )
