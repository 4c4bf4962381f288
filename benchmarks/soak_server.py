"""The server that is soaked, as a process of its own, and what it takes of the machine."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak_http import Connection, Target
from benchmarks.soak_probe import TOKEN

_READY_S = 180.0
_ADDRESS = re.compile(r" at http://([0-9.]+):([0-9]+)")
_SETTLE_S = 120.0
_QUIET_S = 5.0
"""Refused connections linger, and large bodies' memory is given back, for less."""


@dataclass(frozen=True)
class Usage:
    """What a process has."""

    rss_mb: float
    """Resident memory in MB (2^20 bytes)."""
    files: int
    threads: int
    tasks: int
    """Asyncio tasks of the server's loop."""


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, target: Target) -> None:
        self.process, self.log, self.target = process, log, target

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def rss_mb(self) -> float:
        """Resident memory now."""
        return _status_mb(self.process.pid, "VmRSS")

    @property
    def peak_mb(self) -> float:
        """Largest resident memory since `forget_peak`."""
        return _status_mb(self.process.pid, "VmHWM")

    def forget_peak(self) -> None:
        """From now on the peak is that of what comes."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    async def settled(self) -> Usage:
        """What it has once nothing is under way any more."""
        deadline = time.monotonic() + _SETTLE_S
        await asyncio.sleep(_QUIET_S)
        while True:
            await asyncio.sleep(1.0)
            usage, active = await self._usage()
            if active <= 1 or time.monotonic() > deadline:
                return usage

    async def _usage(self) -> tuple[Usage, float]:
        async with Connection(self.target) as connection:
            text = (await connection.ask("GET", "/metrics")).body.decode()
        proc = Path(f"/proc/{self.process.pid}")
        usage = Usage(
            rss_mb=self.rss_mb,
            files=len(list((proc / "fd").iterdir())),
            threads=len(list((proc / "task").iterdir())),
            tasks=int(_metric(text, "dovetail_router_tasks")),
        )
        return usage, _metric(text, "dovetail_router_requests_active")


def _metric(text: str, name: str) -> float:
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise ValueError(f"/metrics has no {name}")


def _status_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/status has no {name}")


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Server]:
    """The server that `command` starts; it says ` at http://HOST:PORT` once it answers, and wants
    the token that is in the variable `DOVETAIL_SOAKTOKEN`.

    Raises:
        RuntimeError: it did not come up; the message has the end of its log.
    """
    token = secrets.token_urlsafe(16)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, TOKEN: token, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        host, port = _address(process, log)
        yield Server(process, log, Target(host, port, token))
    finally:
        _end(process)


def serve_command(model: Path, flags: Sequence[str]) -> list[str]:
    """`dovetail serve` of a model directory, on a free port."""
    own = ["--hf-checkpoint", str(model), "--router-token-env", TOKEN, "--device", "cpu"]
    return [sys.executable, "-m", "dovetail", "serve", *own, *flags]


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        found = _ADDRESS.search(log.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1], int(found[2])
        time.sleep(0.1)
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"the server did not come up; {log} ends with:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """In order, else with its children at once."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
