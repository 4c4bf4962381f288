"""An engine that this run starts as a process of its own: it answers, or its log says why not, and
it never outlives the run.

    ServerProcess -> keeper (transport/keeper.py) -> server -> whatever the server starts
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

from dovetail.transport import keeper
from dovetail.types.errors import EngineError

HOST = "127.0.0.1"
_LOOK_EVERY_S = 0.02
_LOOK_SELDOM_S = 0.2
_KILL_S = 3.0
_TAIL_BYTES, _TAIL_LINES = 2**16, 25
_USAGE = re.compile(r"usage: (.*)^\S+: (error: .*)", re.DOTALL | re.MULTILINE)
"""What argparse prints about a command line that it refuses."""
_SIGNALLED = 128


class HeldPort:
    """A port of this machine that only the engine meant for it can listen on.

    A socket is bound to it and never listens: the system gives the number to nobody who asks for
    any port, while a server that reuses addresses, as all do, may bind it beside us.
    """

    def __init__(self, host: str = HOST, number: int = 0) -> None:
        self._host = host
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, number))
        self.number: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        """`http://host:port`."""
        return f"http://{self._host}:{self.number}"

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


class ServerProcess:
    """A server under a keeper, started by `start`.

    Args:
        command: program and arguments.
        env: variables beside those of this process.
        log_file: what it prints is added there.
        name: what messages call it, e.g. `engine 0 (vllm)`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_file: Path,
        name: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command, self.log_file, self.name = tuple(command), log_file, name
        self._env = dict(env or {})
        self._keeper: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.exit_code: int | None = None
        """Of the server, 128 + n after signal n; None while it runs."""

    def start(self) -> None:
        """Start the process, anew if it has ended.

        Raises:
            EngineError: the log can't be written, or the system refuses another process.
        """
        assert not self.alive, f"{self.name} runs already"
        arguments = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), "--"]
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log_file, "ab") as log:
                log.write(f"--- {' '.join(self.command)}\n".encode())
                log.flush()
                self._log_start = log.tell()
                self._keeper = subprocess.Popen(
                    [*arguments, *self.command],
                    env={**os.environ, **self._env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineError(f"{self.name} can't be started: {error}") from error
        self.exit_code = None

    @property
    def alive(self) -> bool:
        """Whether it runs, be it stopped. Once it does not, nothing of it is left."""
        if self._keeper is None or self.exit_code is not None:
            return False
        # Not reaped before its group is dead: until then the id can't be anybody else's.
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self._keeper.pid, options) is None:
            return True
        self._reap()
        return False

    @property
    def pids(self) -> list[int]:
        """Of the server and of every process below it."""
        if self._keeper is None or not self.alive:
            return []
        return list(processes_below(self._keeper.pid))

    @property
    def stopped(self) -> bool:
        """Whether one of its processes stands still (SIGSTOP): it would never answer."""
        return any(_state(pid) in ("T", "t") for pid in self.pids)

    @property
    def log_tail(self) -> str:
        """The last lines that it printed since its start."""
        try:
            with open(self.log_file, "rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"(the log can't be read: {error.strerror})"
        refused = _USAGE.search(text)
        if refused:
            return refused[2].rstrip() + _meant(refused[2], refused[1])
        return "\n".join(text.splitlines()[-_TAIL_LINES:]) or "(it printed nothing)"

    @property
    def end_of_log(self) -> str:
        """`log_tail` and where it is from, for a message."""
        tail = "\n  ".join(self.log_tail.splitlines())
        return f"the end of its log {self.log_file}:\n  {tail}"

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is None:
            return "it runs"
        if code <= _SIGNALLED:
            return f"it ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"it was ended by {signal.Signals(code - _SIGNALLED).name}"
        return f"it ended with exit code {code}"

    async def wait_ready(self, probe: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Wait until `probe()` is true.

        Raises:
            EngineError: the process ended first, or the time is over; nothing of it is left. The
                message has the end of its log.
        """
        await wait_until_ready(self, probe, timeout_s)

    async def terminate(self, grace_s: float = 0.0) -> None:
        """Ask it to end, and kill what is left of it after `grace_s` seconds."""
        if grace_s > 0:
            self._signal(signal.SIGTERM)
            await self._gone(grace_s)
        self._signal(signal.SIGUSR1)
        if not await self._gone(_KILL_S):
            self._kill_group()
            await self._gone(_KILL_S)

    def kill(self) -> None:
        """Kill it and all below it; returns when nothing is left, within seconds."""
        self._signal(signal.SIGUSR1)
        deadline = time.monotonic() + _KILL_S
        while self.alive and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        if self.alive:
            self._kill_group()
            while self.alive:
                time.sleep(_LOOK_EVERY_S)

    def _signal(self, signum: int) -> None:
        if self._keeper is not None and self.alive:
            os.kill(self._keeper.pid, signum)
            # Whoever stopped the server may have stopped its whole group.
            os.kill(self._keeper.pid, signal.SIGCONT)

    async def _gone(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_EVERY_S)
        return not self.alive

    def _reap(self) -> None:
        assert self._keeper is not None
        self._kill_group()
        code = self._keeper.wait()
        self.exit_code = code if code >= 0 else _SIGNALLED - code

    def _kill_group(self) -> None:
        assert self._keeper is not None
        # Nobody is left of it, or what is left belongs to another user.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._keeper.pid, signal.SIGKILL)


class Started(Protocol):
    """A process of a server, here or elsewhere."""

    name: str

    @property
    def alive(self) -> bool: ...

    @property
    def ending(self) -> str: ...

    @property
    def end_of_log(self) -> str: ...

    async def terminate(self, grace_s: float = ...) -> None: ...


async def wait_until_ready(
    process: Started, probe: Callable[[], Awaitable[bool]], timeout_s: float
) -> None:
    """As `ServerProcess.wait_ready`, of any process."""
    deadline = time.monotonic() + timeout_s
    while process.alive:
        if await probe():
            return
        if time.monotonic() > deadline:
            await process.terminate()
            raise EngineError(
                f"{process.name} did not answer within {timeout_s:.0f} s of its start "
                "(--engine-start-timeout-s, TOML: engine.engine_start_timeout_s); "
                + await _end_of_log(process)
            )
        await asyncio.sleep(_LOOK_SELDOM_S)
    end = await _end_of_log(process)
    raise EngineError(f"{process.name} did not start: {process.ending}; {end}")


async def _end_of_log(process: Started) -> str:
    """Another machine may take its time to tell."""
    return await asyncio.to_thread(lambda: process.end_of_log)


def _meant(error: str, usage: str) -> str:
    """A guess at the flags that an error of argparse complains about."""
    known = set(re.findall(r"--[a-z][\w.-]+", usage))
    wrong = re.findall(r"--[a-z][\w.-]+", error)
    near = [match for flag in wrong for match in get_close_matches(flag, known - {flag}, n=1)]
    return f" (did you mean {', '.join(near)}?)" if near and "unrecognized" in error else ""


def processes_below(pid: int) -> Iterator[int]:
    """Every process below this one; ones that end meanwhile are left out."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text(encoding="ascii").split())
    for child in children:
        yield child
        yield from processes_below(child)


def _state(pid: int) -> str | None:
    """One letter, as in proc(5); None for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None
