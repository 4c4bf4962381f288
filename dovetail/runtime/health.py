"""Looks after engines: who died, stands still or does not answer is taken out of the pool, started
anew, given the current weights, and let in again.

    ready --exit | SIGSTOP | looks that fail | a command that failed--> dead (pool.mark_dead)
      ^                                                                  |  ended, back-off
      +---- pool.admit: weights of now, version asked back <---- started-+

With `repairs` off the first death is the end of the run. A process may be on another machine that
does not answer: whatever asks it does so in a thread, never on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.engines import identify
from dovetail.router.balancer.pool import Pool
from dovetail.router.balancer.worker import Worker, WorkerState
from dovetail.runtime.damage import damage
from dovetail.runtime.home import Server
from dovetail.types.errors import EngineError
from dovetail.types.ports import RemoteEngine

log = logging.getLogger(__name__)

MOST_STARTS = 5
"""Starts in a row that led to no answer, after which an engine is given up."""
FIRST_REST_S, LONGEST_REST_S = 0.5, 30.0
"""Before the second start in a row, and before later ones."""
GRACE_S = 5.0
"""That an engine has to end by itself."""
_NEXT_CHANCE_S = 0.5
_EXIT_SHOWS_S = 0.2
_TICK_S = 0.05
_LATE_LOOK_S = 2.0
_LINE = 200
_FAULTS = (EngineError, OSError)


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """How engines are looked after."""

    interval_s: float = 5.0
    timeout_s: float = 10.0
    first_wait_s: float = 0.0
    failure_threshold: int = 3
    start_timeout_s: float = 600.0
    waits_for_attached: bool = False
    """Whether an engine that somebody else starts may come later than the run."""
    repairs: bool = True


@dataclass(eq=False, slots=True)
class Member:
    """One engine of a fleet."""

    name: str
    """As messages call it, e.g. `engine 0 (vllm)`."""
    engine: RemoteEngine
    process: Server | None = None
    """None: somebody else started it."""
    restarts: int = 0
    """How often it was let in again."""
    vain_starts: int = 0
    """Starts in a row that led to no answer."""
    given_up: bool = False
    answered: int = 0
    """Of the pool's worker, when it was let in last."""
    worker: Worker | None = None
    """As the pool knows it, or knew it."""
    poke: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: look now."""

    async def start(self, timeout_s: float, look_s: float, *, patient: bool = True) -> None:
        """Start the process if it is ours, and wait until it answers; `look_s` is the longest wait
        for an answer.

        Args:
            patient: whether to wait for one of somebody else's where nothing listens.

        Raises:
            EngineError: it does not; the message has the end of its log. At once: what answers
                there is another kind of server.
        """

        async def reacts() -> bool:
            return await self.engine.healthy(look_s)

        if self.process is not None:
            await _elsewhere(self.process.start)
            await self.process.wait_ready(reacts, timeout_s)
            return
        deadline = time.monotonic() + timeout_s
        while True:
            found = await identify.identify(self.engine.url, self.engine.token, look_s)
            unfit = found.unfit(self.engine.url, self.engine.dialect)
            unfit = unfit or (None if patient else found.absent(self.engine.url))
            if unfit:
                raise EngineError(f"{self.name}: {unfit}")
            if found.dialect is not None and await reacts():
                return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.name} did not answer within {timeout_s:.0f} s: {found.said} "
                    "(--rollout-external-engine-addrs, TOML: engine.rollout_external_engine_addrs; "
                    "--engine-start-timeout-s, TOML: engine.engine_start_timeout_s)"
                )
            await asyncio.sleep(_TICK_S)

    async def condition(self) -> str:
        """Why it may not answer yet: how a look at it ends, its process, the end of its log."""
        said = [await identify.condition(self.engine.url, self.engine.token, _LATE_LOOK_S)]
        if self.process is not None:
            said += await asyncio.to_thread(_seen, self.process)
        return "; ".join(said)


class Supervisor:
    """Looks after the engines of one pool, each in a task of its own; also after those that are
    added to the pool while it runs, and no more after those that are taken out.

    Args:
        on_fatal: called once, when no engine is left or none may be started again.
    """

    def __init__(
        self,
        pool: Pool,
        settings: HealthSettings,
        on_fatal: Callable[[EngineError], None],
    ) -> None:
        self.pool, self.settings, self._on_fatal = pool, settings, on_fatal
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._stir = asyncio.Event()
        self.met: list[Member] = []
        """Everyone who was ever looked after, in the order in which they came."""
        pool.at_change.append(self._follow)

    @property
    def members(self) -> list[Member]:
        """Who is looked after."""
        return list(self._tasks)

    def start(self, members: Sequence[Member]) -> None:
        """Look after these from now on; the pool has them."""
        self._sweeper = asyncio.ensure_future(self._sweep())
        for member in members:
            self._look_after(member, self.pool.worker(member.engine.url))

    async def close(self) -> None:
        """Look after nobody any more."""
        tasks = [*self._tasks.values(), *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def failed(self, worker: Worker, error: Exception) -> None:
        """The pool's `on_failure`: a request or a command of this engine failed."""
        for member in self.members:
            if member.engine.url == worker.url:
                member.poke.set()

    def _follow(self) -> None:
        """The pool has changed. Whoever came is known from now on, however soon it leaves."""
        if self._sweeper is None:
            return
        self._stir.set()
        # By worker, not by address: one may be taken out and another put in its place.
        known = {id(member.worker) for member in self._tasks}
        for worker in self.pool.workers.values():
            if id(worker) not in known:
                number = len(self.met)
                name = f"engine {number} ({worker.dialect} at {worker.url}, joined)"
                log.warning("engine %d at %s joins", number, worker.url)
                self._look_after(Member(name, worker.engine), worker)

    def _look_after(self, member: Member, worker: Worker) -> None:
        member.worker = worker
        self.met.append(member)
        self._tasks[member] = asyncio.ensure_future(self._keep(member, worker))

    async def _sweep(self) -> None:
        """Let go of those who left."""
        while True:
            for member in self.members:
                if member.worker is not None and self._is_out(member.worker):
                    await self._let_go(member)
            await self._stir.wait()
            self._stir.clear()

    async def _let_go(self, member: Member) -> None:
        log.warning("%s leaves", member.name)
        task = self._tasks.pop(member)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if member.process is not None:
            await member.process.terminate(GRACE_S)

    async def _keep(self, member: Member, worker: Worker) -> None:
        while True:
            reason = await self._until_dead(member, worker)
            if self._is_out(worker):
                return
            log.warning("%s at %s is dead: %s", member.name, member.engine.url, reason)
            self.pool.mark_dead(member.engine.url, reason)
            if not self.settings.repairs:
                self._on_fatal(
                    EngineError(
                        f"{member.name} died: {reason}; --use-fault-tolerance (TOML: "
                        "engine.use_fault_tolerance = true) starts engines anew"
                    )
                )
                return
            if not await self._whole_weights(member):
                return
            if not await self._bring_back(member, worker):
                return

    # Finding out

    async def _until_dead(self, member: Member, worker: Worker) -> str:
        """Why it is dead, or was taken out."""
        return await _first(self._until_gone(member), self._until_silent(member, worker))

    async def _until_gone(self, member: Member) -> str:
        """Why the process is of no use; without a process of ours never."""
        process, looked = member.process, time.monotonic()
        while process is None or process.alive:
            if process is not None and time.monotonic() - looked >= self._stop_look_s:
                if await asyncio.to_thread(lambda: process.stopped):
                    return "it stands still (SIGSTOP)"
                looked = time.monotonic()
            await asyncio.sleep(_TICK_S)
        return process.ending

    @property
    def _stop_look_s(self) -> float:
        return min(self.settings.interval_s, 1.0)

    async def _until_silent(self, member: Member, worker: Worker) -> str:
        """Why the pool counts it as dead, or for how long it has not answered."""
        own = self.settings
        failed, wait_s = 0, max(own.first_wait_s, own.interval_s)
        member.poke.clear()
        while failed < own.failure_threshold and not _is_dead(worker):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(member.poke.wait(), wait_s)
            member.poke.clear()
            wait_s = own.interval_s
            # One that is taking weights may be too busy; if it dies of them, that shows. The client
            # of one that was taken out is closed.
            if _is_dead(worker) or self.pool.update_lock.locked() or self._is_out(worker):
                continue
            if await member.engine.healthy(own.timeout_s):
                failed = 0
                continue
            failed += 1
            # However many requests fail meanwhile: one more chance is one a moment later.
            await asyncio.sleep(min(own.interval_s, _NEXT_CHANCE_S))
        if _is_dead(worker):
            # If its process is gone, that is the better reason, and known in a moment.
            await asyncio.sleep(_EXIT_SHOWS_S)
            return worker.reason
        return f"{failed} looks in a row found that it does not react"

    def _is_out(self, worker: Worker) -> bool:
        return self.pool.workers.get(worker.url) is not worker

    # Repair

    async def _whole_weights(self, member: Member) -> bool:
        """Wait until there are weights that an engine can load; False: no engine is left meanwhile,
        which is the end."""
        while found := await damage(self.pool):
            log.error("%s stays away until the next weights: %s", member.name, found)
            damaged = self.pool.snapshot
            while self.pool.snapshot is damaged:
                if not self.pool.ready():
                    self._on_fatal(EngineError(found))
                    return False
                await asyncio.sleep(_NEXT_CHANCE_S)
        return True

    async def _bring_back(self, member: Member, worker: Worker) -> bool:
        """Start it anew, again and again, and let it in; False: it was given up, or taken out."""
        if worker.answered > member.answered:
            member.vain_starts = 0
        if member.vain_starts >= MOST_STARTS:
            self._give_up(member, await asyncio.to_thread(_of_no_use, member, worker))
            return False
        while True:
            await asyncio.sleep(_rest_s(member.vain_starts))
            try:
                await self._start_and_admit(member)
            except _FAULTS as error:
                if self._is_out(worker):
                    return False
                member.vain_starts += 1
                log.warning("%s can't be brought back: %s", member.name, error)
                if member.vain_starts >= MOST_STARTS:
                    self._give_up(member, error)
                    return False
                continue
            member.restarts += 1
            member.vain_starts += 1  # Until it has answered something.
            member.answered = worker.answered
            # After the warning that it died, whoever watches wants to know.
            version = worker.weight_version
            with_weights = "" if version is None else f", weights of version {version}"
            log.warning("%s is back%s", member.name, with_weights)
            return True

    async def _start_and_admit(self, member: Member) -> None:
        if member.process is not None:
            await member.process.terminate()
        await member.start(self.settings.start_timeout_s, self.settings.timeout_s)
        reason = await _first(self._admit(member), self._until_gone(member))
        if reason:
            raise EngineError(f"while it took the weights: {reason}")

    async def _admit(self, member: Member) -> str:
        await self.pool.admit(member.engine.url)
        return ""

    def _give_up(self, member: Member, error: Exception) -> None:
        member.given_up = True
        log.error("%s is given up after %d starts in vain", member.name, member.vain_starts)
        if any(not one.given_up for one in self.members):
            return
        said = f"no engine is left; {member.name} did not come back: {error}"
        self.pool.give_up(said)
        self._on_fatal(EngineError(said))


def _seen(process: Server) -> list[str]:
    """Of a process, as far as it can be asked."""
    pids = process.pids
    state = f"process {pids[0]} runs" if pids else process.ending
    if pids and process.stopped:
        state = f"process {pids[0]} stands still (SIGSTOP)"
    lines = [line.strip() for line in process.log_tail.splitlines() if line.strip()]
    last = lines[-1][:_LINE] if lines else "(empty)"
    return [state, f"the last line of its log {process.log_file}: {last}"]


async def _elsewhere(start: Callable[[], None]) -> None:
    """Start a process without holding up the loop; who is cancelled waits until there is something
    to end."""
    starting = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        await asyncio.wait({starting})
        raise


def _of_no_use(member: Member, worker: Worker) -> EngineError:
    end = "" if member.process is None else f"; {member.process.end_of_log}"
    return EngineError(
        f"it died {member.vain_starts} times in a row before it had answered anything, the last "
        f"time because: {worker.reason}{end}"
    )


def _is_dead(worker: Worker) -> bool:
    return worker.state is WorkerState.DEAD


def _rest_s(vain_starts: int) -> float:
    return min(FIRST_REST_S * 2 ** (vain_starts - 1), LONGEST_REST_S) if vain_starts else 0.0


async def _first(*works: Coroutine[Any, Any, str]) -> str:
    """What the first of them says; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
