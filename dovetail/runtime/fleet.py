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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.engines.process import HeldPort, ServerProcess
from dovetail.router.pool import Pool
from dovetail.router.worker import Worker
from dovetail.runtime.health import HealthSettings, Member, Supervisor
from dovetail.runtime.on_loop import LoopThread, OnLoop
from dovetail.transport.snapshot import SnapshotStore
from dovetail.types.calls import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult
from dovetail.types.errors import EngineError
from dovetail.types.ports import RemoteEngine

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""That engines have to end by themselves."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine of a fleet."""

    name: str
    """As messages call it, e.g. `engine 0 (vllm)`."""
    client: Callable[[], RemoteEngine]
    """Makes what speaks to it; called on the fleet's loop."""
    port: HeldPort | None = None
    """Where it will listen; None: it runs already, started by somebody else."""
    command: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    """On top of the run's own environment."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """See `router.pool.Pool`."""

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


class Fleet:
    """Starts engines or attaches to them, keeps them going, and gives them weights.

    Used from the run's thread; `engine` is what the run's loop uses.

    Args:
        specs: at least one.
        store: makes what carries weights to them; None: nothing is ever published.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        *,
        pool: PoolSettings | None = None,
        health: HealthSettings | None = None,
        store: Callable[[], SnapshotStore] | None = None,
    ) -> None:
        assert specs, "a fleet has engines"
        self.specs = list(specs)
        self._pool, self._health = pool or PoolSettings(), health or HealthSettings()
        self._make_store = store
        self._store: SnapshotStore | None = None
        self._thread: LoopThread | None = None
        self._far: FarFleet | None = None
        self.engine = OnLoop(self)

    def start(self, log_dir: Path) -> None:
        """Start, or reach, every engine; each one that is started writes a log in `log_dir`.

        Raises:
            EngineError: one does not come up; what was started is ended.
            ConfigError: the weights have no place.
        """
        self._thread = LoopThread("engines")
        try:
            self._store = None if self._make_store is None else self._make_store()
            made = FarFleet(self._pool, self._health, self._store)
            self._far = made
            self._thread.wait_for(made.start(self.specs, log_dir))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every engine that was started. A second call does nothing."""
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
        for spec in self.specs:
            if spec.port is not None:
                spec.port.close()

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

    def __init__(
        self, pool: PoolSettings, health: HealthSettings, store: SnapshotStore | None
    ) -> None:
        self._settings, self._health, self._store = pool, health, store
        self._pool: Pool | None = None
        self._supervisor: Supervisor | None = None
        self.members: list[Member] = []
        self._failure: EngineError | None = None
        self._update_s = self._update_bytes = 0.0

    @property
    def pool(self) -> Pool:
        """The engines as one."""
        assert self._pool is not None, "it is made when the fleet starts"
        return self._pool

    async def start(self, specs: Sequence[EngineSpec], log_dir: Path) -> None:
        """As `Fleet.start`."""
        self.members = [_member(spec, log_dir) for spec in specs]
        starts = [
            asyncio.ensure_future(one.start(self._health.start_timeout_s, self._health.timeout_s))
            for one in self.members
        ]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        self._pool = Pool(
            policy=self._settings.policy,
            per_worker=self._settings.per_worker,
            queue_size=self._settings.queue_size,
            request_timeout_s=self._settings.request_timeout_s,
            failure_threshold=self._settings.failure_threshold,
            repaired=self._health.repairs,
        )
        for member in self.members:
            self._pool.add(member.engine)
        self._supervisor = Supervisor(self._pool, self.members, self._health, self._end)
        self._pool.on_failure = self._supervisor.failed
        self._supervisor.start()

    async def close(self) -> None:
        """End the requests, then the engines that were started."""
        if self._supervisor is not None:
            await self._supervisor.close()
        if self._pool is not None:
            await self._pool.close()
        ends = [one.process.terminate(GRACE_S) for one in self.members if one.process is not None]
        await asyncio.gather(*ends)

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

    async def receive_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]] | None
    ) -> None:
        """Write them once, and have every engine load them.

        Raises:
            EngineError: they can't be written, or no engine takes them.
        """
        assert tensors is not None and self._store is not None, "nothing is shared with a process"
        self._check()
        started = time.perf_counter()
        snapshot = await asyncio.to_thread(self._store.write, version, tensors)
        await self.pool.load(snapshot)
        self._store.retire(version)
        self._update_s = time.perf_counter() - started
        self._update_bytes = float(snapshot.num_bytes)

    @property
    def weight_version(self) -> int:
        """Of the weights that were published last; 0: none were."""
        return 0 if self._pool is None else self._pool.weight_version

    def facts(self) -> list[EngineFacts]:
        """As `Fleet.facts`; from any thread."""
        if self._pool is None:
            return []
        workers = dict(self._pool.workers)
        return [_facts(one, workers[one.engine.url]) for one in self.members]

    def metrics(self) -> dict[str, float]:
        """As `Fleet.metrics`; from any thread."""
        if self._pool is None:
            return {}
        facts, stats = self.facts(), self._pool.stats
        found = {
            "engines/ready": sum(one.ready for one in facts),
            "engines/restarts": sum(one.restarts for one in facts),
            "engines/resent_requests": stats.resent,
            "engines/fenced_answers": stats.fenced,
            "engines/weight_update_bytes": self._update_bytes,
            "time/weight_update_s": self._update_s,
        }
        for number, one in enumerate(facts):
            found[f"engines/{number}/answered"] = one.answered
            if one.weight_version is not None:
                found[f"engines/{number}/weight_version"] = one.weight_version
        return {name: float(value) for name, value in found.items()}

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure

    def _end(self, error: EngineError) -> None:
        """The run can't go on without what is lost."""
        log.error("%s", error)
        self._failure = self._failure or error
        self.pool.give_up(str(error))


def _member(spec: EngineSpec, log_dir: Path) -> Member:
    process = None
    if spec.port is not None:
        log_file = log_dir / f"{spec.name.split(' (')[0].replace(' ', '_')}.log"
        process = ServerProcess(spec.command, log_file=log_file, name=spec.name, env=spec.env)
    return Member(spec.name, spec.client(), process)


def _facts(member: Member, worker: Worker) -> EngineFacts:
    return EngineFacts(
        name=member.name,
        url=worker.url,
        answered=worker.answered,
        restarts=member.restarts,
        weight_version=worker.weight_version,
        ready=worker.ready,
    )
