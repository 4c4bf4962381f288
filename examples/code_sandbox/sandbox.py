"""Runs a program that nobody has read in a child process, within limits.

outcome = await run_program("print(6 * 7)")
outcome.reason, outcome.stdout      # Reason.FINISHED, "42\\n"
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
MEGABYTE = 1 << 20
_STARTUP_S = 10.0
"""Time for the interpreter to start on a busy machine; it does not count as the program's."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_s: float = 4.0
    cpu_s: int = 2
    memory_bytes: int = 256 * MEGABYTE
    """Of address space, the interpreter's own included (about 30 MB)."""
    file_bytes: int = MEGABYTE
    """Per file that it writes."""
    output_bytes: int = 64 * 1024
    """Of stdout, and of stderr."""
    open_files: int = 32
    fence: bool = True
    """The audit hook inside the kernel's walls; see guard.py."""


class Reason(StrEnum):
    """How a program ended."""

    FINISHED = "finished"
    FAILED = "failed"
    """With an exit code that is not 0: most often an exception, which stderr shows."""
    TIMEOUT = "timeout"
    FLOODED = "flooded"
    """It printed more than it may."""
    KILLED = "killed"
    """By a signal: it crashed, or ran into a limit."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    reason: Reason
    stdout: str = ""
    stderr: str = ""
    walls: tuple[str, ...] = ()
    """Which of the kernel's walls stood: network, files, processes."""


class SandboxError(RuntimeError):
    """The sandbox is at fault, not the program in it."""


async def run_program(program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run Python source with `stdin`; whatever it does, nothing of it is left when this returns.

    Raises:
        SandboxError: the program was not started.
    """
    limits = limits or Limits()
    home = tempfile.mkdtemp(prefix="sandbox-")
    try:
        Path(home, "program.py").write_text(program, encoding="utf-8", errors="replace")
        return await _run(home, stdin, limits)
    finally:
        await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)


async def _run(home: str, stdin: str, limits: Limits) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-B", str(GUARD), json.dumps(asdict(limits))),
        cwd=home,
        env={"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        walls = await _walls(process)
        # The program's time starts when the walls stand.
        return await _watch(process, stdin, limits, walls)
    finally:
        _kill(process)
        await process.communicate()


def _kill(process: asyncio.subprocess.Process) -> None:
    """The process and all that it started: they are one session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _walls(process: asyncio.subprocess.Process) -> tuple[str, ...]:
    assert process.stderr is not None
    try:
        line = await asyncio.wait_for(process.stderr.readline(), _STARTUP_S)
        return tuple(json.loads(line))
    except (TimeoutError, ValueError) as error:
        raise SandboxError(f"the guard did not start: {error!r}") from error


async def _watch(
    process: asyncio.subprocess.Process, stdin: str, limits: Limits, walls: tuple[str, ...]
) -> Outcome:
    assert process.stdin and process.stdout and process.stderr
    out, err = _Output(limits.output_bytes), _Output(limits.output_bytes)
    talk = asyncio.gather(
        _feed(process.stdin, stdin),
        out.read(process.stdout, process),
        err.read(process.stderr, process),
        process.wait(),
    )
    try:
        ended, _ = await asyncio.wait([talk], timeout=limits.wall_s)
    finally:
        # Killed, it closes its ends of the pipes, which ends the readers.
        _kill(process)
        await talk
    reason = _reason(process.returncode) if ended else Reason.TIMEOUT
    if out.flooded or err.flooded:
        reason = Reason.FLOODED
    return Outcome(reason, out.text, err.text, walls)


class _Output:
    """The first `most` bytes of a pipe; a program that writes more is killed."""

    def __init__(self, most: int) -> None:
        self.most, self.data, self.flooded = most, bytearray(), False

    async def read(self, pipe: asyncio.StreamReader, process: asyncio.subprocess.Process) -> None:
        while chunk := await pipe.read(MEGABYTE):
            room = self.most - len(self.data)
            self.data += chunk[:room]
            if len(chunk) > room:
                self.flooded = True
                _kill(process)

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace")


async def _feed(stream: asyncio.StreamWriter, text: str) -> None:
    # A program that does not read its input may be gone before all of it is written.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(text.encode(errors="replace"))
        await stream.drain()
        stream.close()


def _reason(code: int | None) -> Reason:
    if code == 0:
        return Reason.FINISHED
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        # The kernel's answer to too much processor time.
        return Reason.TIMEOUT
    return Reason.KILLED if code is not None and code < 0 else Reason.FAILED
