"""Looking after engines does not hold up the loop that requests go over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dovetail.engines.process import wait_until_ready
from dovetail.router.balancer.pool import Pool
from dovetail.runtime.health import HealthSettings, Member, Supervisor
from dovetail.types.errors import EngineError


class FarProcess:
    """On a machine that takes its time to answer: notes which threads wait for it."""

    name, log_file = "engine 0", Path("engine_0.log")

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.alive, self.stands_still, self.began = True, False, threading.Event()
        self.may_start = threading.Event()
        self.may_start.set()

    def _note(self, what: str) -> None:
        self.asked[what] = threading.get_ident()

    def start(self) -> None:
        self._note("start")
        self.began.set()
        assert self.may_start.wait(30)

    @property
    def stopped(self) -> bool:
        self._note("stopped")
        return self.stands_still

    @property
    def pids(self) -> list[int]:
        self._note("pids")
        return [7]

    @property
    def log_tail(self) -> str:
        self._note("log_tail")
        return "loading\n42 %\n"

    @property
    def end_of_log(self) -> str:
        self._note("end_of_log")
        return "the end of its log"

    @property
    def ending(self) -> str:
        return "it ended"

    async def wait_ready(self, probe: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        await wait_until_ready(self, probe, timeout_s)

    async def terminate(self, grace_s: float = 0.0) -> None:
        self.alive = False


class Engine:
    """Answers nobody."""

    url, token, dialect = "http://127.0.0.1:9", None, "vllm"

    def __init__(self, healthy: bool = True) -> None:
        self._healthy = healthy

    async def healthy(self, timeout_s: float) -> bool:
        return self._healthy


def member(process: FarProcess, healthy: bool = True) -> Member:
    engine: Any = Engine(healthy)
    return Member("engine 0", engine, process)


def off_loop(process: FarProcess, *names: str) -> bool:
    return set(process.asked) == set(names) and threading.get_ident() not in process.asked.values()


def test_a_start_is_waited_for_in_a_thread() -> None:
    process = FarProcess()
    asyncio.run(member(process).start(5.0, 1.0))
    assert off_loop(process, "start")


def test_who_stops_a_start_waits_until_there_is_something_to_end() -> None:
    process = FarProcess()
    process.may_start.clear()

    async def stopped_midway() -> bool:
        starting = asyncio.ensure_future(member(process).start(5.0, 1.0))
        await asyncio.to_thread(process.began.wait, 30)
        starting.cancel()
        await asyncio.sleep(0.05)
        waits = not starting.done()
        process.may_start.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        return waits

    assert asyncio.run(stopped_midway())


def test_a_log_that_an_error_quotes_is_read_in_a_thread() -> None:
    process = FarProcess()
    with pytest.raises(EngineError, match="the end of its log"):
        asyncio.run(member(process, healthy=False).start(0.0, 1.0))
    assert off_loop(process, "start", "end_of_log")


def test_the_condition_of_a_process_is_asked_in_a_thread() -> None:
    process = FarProcess()
    said = asyncio.run(member(process).condition())
    assert "process 7 runs; the last line of its log engine_0.log: 42 %" in said
    process.stands_still = True
    assert "process 7 stands still" in asyncio.run(member(process).condition())
    assert off_loop(process, "pids", "stopped", "log_tail")


def test_whether_it_stands_still_is_asked_in_a_thread() -> None:
    process = FarProcess()
    process.stands_still = True

    async def looked_after() -> str:
        supervisor = Supervisor(Pool(), HealthSettings(interval_s=0.01), lambda error: None)
        return await supervisor._until_gone(member(process))

    assert asyncio.run(asyncio.wait_for(looked_after(), 30)) == "it stands still (SIGSTOP)"
    assert off_loop(process, "stopped")
