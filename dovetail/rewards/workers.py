"""Worker processes for work that may hang, crash or eat memory: each can be killed at any moment.

    call --> free worker --request line--> process --reply line--> back
                |  no reply in time, or it died
                +--> killed, and another one started in its place

A worker is a module run as `python -m`; requests and replies are JSON lines on its standard input
and output. It limits its own memory, and ends when its parent does. Threads can't be cut off and a
signal is not seen inside one long C call, so a process is the only thing with which a time limit
holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dovetail.types.errors import RewardError

_START_TIMEOUT_S = 120.0
_MOST_REQUEST_BYTES = 60_000
"""An idle worker's pipe takes this much at once (Linux: 65,536), so a write never blocks the
loop."""


class WorkerDiedError(RuntimeError):
    """A worker ended by itself instead of answering."""


class _DiedStartingError(WorkerDiedError):
    """It ended before it took its first request."""


class WorkerPool:
    """At most `size` processes of one module, started at first need and kept warm.

    Args:
        module: what a worker runs; it calls `worker_process.serve`.
        size: processes, and so calls at a time; others wait their turn without time running.
        timeout_s: seconds that one call may take once it has a worker that is ready.
        memory_bytes: address space of a worker.
    """

    def __init__(
        self, module: str, *, size: int, timeout_s: float, memory_bytes: int = 2 << 30
    ) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.num_replaced = 0
        """Workers killed or lost so far, each one replaced."""
        self._command = [sys.executable, "-P", "-m", module, str(os.getpid()), str(memory_bytes)]
        self._turn = asyncio.Semaphore(size)
        self._free: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False

    @property
    def num_alive(self) -> int:
        """Processes that run now."""
        return sum(worker.is_alive() for worker in self._all)

    async def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's reply to a JSON-able request.

        Raises:
            TimeoutError: no reply within `timeout_s`; the worker was killed.
            WorkerDiedError: two workers in a row died of this request.
            RewardError: a worker can't be started, or the pool is closed.
            ValueError: the request is larger than a worker takes.
        """
        line = json.dumps({**request, "limit_s": self.timeout_s + 1.0}).encode() + b"\n"
        if len(line) > _MOST_REQUEST_BYTES:
            raise ValueError(f"a request of {len(line)} bytes, at most {_MOST_REQUEST_BYTES}")
        async with self._turn:
            # A worker may die of something else than this request, e.g. of a signal to the whole
            # process group: only the second death is the request's.
            with suppress(WorkerDiedError):
                return await self._call_once(line)
            try:
                return await self._call_once(line)
            except _DiedStartingError as error:
                raise RewardError(
                    f"a reward's worker process can't start: {' '.join(self._command)} ends at once"
                ) from error

    async def _call_once(self, line: bytes) -> dict[str, Any]:
        worker = self._take()
        answered = False
        try:
            reply = await worker.exchange(line, self.timeout_s)
            answered = True
            return reply
        finally:
            if answered:
                self._free.append(worker)
            else:
                self._replace(worker)

    def _take(self) -> _Worker:
        if self._closed:
            raise RewardError("the reward's worker processes are closed")
        # The one that waits longest: a fresh one may still be starting.
        return self._free.pop(0) if self._free else self._start()

    def _start(self) -> _Worker:
        worker = _Worker(self._command)
        self._all.add(worker)
        return worker

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self.num_replaced += 1
        # Reaping waits for the kernel to free its memory: killed ones are looked at again here.
        self._all = {one for one in self._all if not one.is_reaped()}
        if not self._closed:
            self._free.append(self._start())

    def close(self) -> None:
        """Kill all workers and wait until they are gone. Calls in flight fail."""
        self._closed = True
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            worker.reap()
        self._all.clear()
        self._free.clear()


class _Worker:
    """One process and the bytes that it has sent so far."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=worker_environment(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._received = b""
        self._arrived: asyncio.Future[bytes] | None = None
        self._ready = False
        self._killed = False

    async def exchange(self, line: bytes, timeout_s: float) -> dict[str, Any]:
        if not self._ready:
            await self._get_ready()
        try:
            self._stdin.write(line)
        except OSError as error:
            raise WorkerDiedError("the worker died while idle") from error
        async with asyncio.timeout(timeout_s):
            return await self._reply()

    async def _get_ready(self) -> None:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                hello = await self._reply()
        except WorkerDiedError as error:
            raise _DiedStartingError(str(error)) from error
        except TimeoutError as error:
            raise RewardError(
                f"a reward's worker process did not start within {_START_TIMEOUT_S:.0f} s"
            ) from error
        if "error" in hello:
            raise RewardError(f"a reward's worker process can't start: {hello['error']}")
        self._ready = True

    async def _reply(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        self._arrived = loop.create_future()
        loop.add_reader(self._stdout.fileno(), self._read)
        try:
            return dict(json.loads(await self._arrived))
        finally:
            self._stop_reading()

    def _stop_reading(self) -> None:
        # Before the pipe is closed: its number may be another file's right after.
        if self._arrived is not None:
            loop = self._arrived.get_loop()
            if not loop.is_closed():
                loop.remove_reader(self._stdout.fileno())
                if not self._arrived.done():
                    self._arrived.set_exception(WorkerDiedError("the worker was ended"))
            self._arrived = None

    def _read(self) -> None:
        try:
            chunk = os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        self._received += chunk
        if self._arrived is None or self._arrived.done():
            return
        if b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            self._arrived.set_result(line)
        elif not chunk:
            self._arrived.set_exception(WorkerDiedError("the worker died before it answered"))

    def is_alive(self) -> bool:
        return not self._killed and self._process.poll() is None

    def is_reaped(self) -> bool:
        return self._killed and self._process.poll() is not None

    def kill(self) -> None:
        if not self._killed:
            self._killed = True
            self._process.kill()
            self._stop_reading()
            self._stdin.close()
            self._stdout.close()

    def reap(self) -> None:
        self._process.wait()


def worker_environment() -> dict[str, str]:
    """Nothing of the parent's but what Python needs to start: no secrets for a hostile answer."""
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    package_parent = str(Path(__file__).resolve().parents[2])
    return {**environment, "PYTHONPATH": package_parent, "OMP_NUM_THREADS": "1"}
