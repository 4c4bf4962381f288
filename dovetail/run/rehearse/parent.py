"""The side that lives on: starts the child, reads verdicts, ends a child that stands still."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dovetail.config.resolve import Resolved
from dovetail.run.rehearse.stuck import Kind, Standstill, read_dump, standstill
from dovetail.run.rehearse.verdict import Item, Outcome, Verdict

_PREPARE_S = 180.0
"""Our own imports (torch on a slow disk); no user code runs meanwhile."""
IMPORTS_S = 60.0
"""Longest that importing a library may hold up one hook."""
_GRACE_S = 0.5
"""The child looks at its own clock first: it can tell where an awaiting function stands."""
_DUMP_S = 2.0
"""Longest that a child on a busy machine may take to say where it stands."""
_PATIENCE = 3
"""How often a child in none of the user's lines gets its time anew: the machine may be busy."""
_PRINTED_CHARACTERS = 4000


def rehearse(resolved: Resolved, items: Sequence[Item], timeout_s: float) -> Iterator[Verdict]:
    """One verdict per item, in order, as they come.

    Args:
        resolved: the run; hooks get a view of it as `args`.
        items: what to rehearse.
        timeout_s: seconds that loading a hook or one call of it may take.
    """
    left = list(items)
    while left:
        with _Child(resolved, left, timeout_s) as child:
            for verdict in child.verdicts():
                left.pop(0)
                yield verdict


class _Child:
    """One child process, working through items until one of them costs it."""

    def __init__(self, resolved: Resolved, items: Sequence[Item], timeout_s: float) -> None:
        self._items, self._timeout_s = list(items), timeout_s
        self._request = {
            "config": resolved.config.model_dump(mode="json"),
            "passthrough": resolved.passthrough,
            "items": [vars(item) for item in items],
            "timeout_s": timeout_s,
            "sys_path": sys.path,
        }
        self._received = b""
        self._shown = 0
        self._stage: dict[str, Any] = {"stage": "start"}
        self._since = self._began = time.monotonic()
        self._patience = _PATIENCE
        self._read_unheld = False
        """Its stacks were read while its threads may have gone on: that may crash it."""

    def __enter__(self) -> _Child:
        reading, writing = os.pipe()
        asked, self._ask = os.pipe()
        self._output = tempfile.TemporaryFile()
        self._dump = tempfile.TemporaryFile(buffering=0)
        command = [sys.executable, "-P", "-m", "dovetail.run.rehearse"]
        self._process = subprocess.Popen(
            [*command, str(writing), str(self._dump.fileno()), str(asked)],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            pass_fds=(writing, self._dump.fileno(), asked),
            start_new_session=True,
        )
        os.close(writing)
        os.close(asked)
        self._replies = reading
        self._ready = selectors.DefaultSelector()
        self._ready.register(reading, selectors.EVENT_READ)
        assert self._process.stdin is not None
        # A child that is gone already is told by the end of its replies.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(self._request).encode())
            self._process.stdin.close()
        return self

    def __exit__(self, *exc: object) -> None:
        self._kill()
        self._ready.close()
        os.close(self._replies)
        os.close(self._ask)
        self._output.close()
        self._dump.close()

    def verdicts(self) -> Iterator[Verdict]:
        """Verdicts until the items are through, or one of them ended or blocked the process."""
        waiting = list(self._items)
        while waiting:
            message = self._next()
            if message is not None and "stage" in message:
                self._stage, self._since = message, time.monotonic()
            if message is None or "verdict" in message:
                item = waiting.pop(0)
                lost = message is None or message.get("lost", False)
                verdict = self._lost(item) if message is None else _read(message["verdict"])
                verdict.printed = self._printed()
                verdict.seconds = time.monotonic() - self._began
                self._began, self._patience = time.monotonic(), _PATIENCE
                yield verdict
                if lost:
                    return

    def _next(self) -> dict[str, Any] | None:
        """The next message; None: the child is gone, or had to be ended."""
        self._stuck: Standstill | None = None
        while b"\n" not in self._received:
            if self._ready.select(self._remaining()):
                chunk = os.read(self._replies, 1 << 16)
                if not chunk:
                    return None
                self._received += chunk
            elif self._is_stuck():
                return None
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def _remaining(self) -> float:
        mine = self._stage["stage"] in ("start", "prepare")
        limit = _PREPARE_S if mine else self._timeout_s + _GRACE_S
        return max(0.0, self._since + limit - time.monotonic())

    def _is_stuck(self) -> bool:
        stuck = standstill(read_dump(self._stacks()), self._home())
        importing = stuck.kind is Kind.IMPORT and time.monotonic() - self._began < IMPORTS_S
        if importing:
            self._since = time.monotonic()
            return False
        if self._stage["stage"] in ("start", "prepare"):
            self._kill()
            return True
        if stuck.kind is Kind.NOWHERE and self._patience:
            self._since, self._patience = time.monotonic(), self._patience - 1
            return False
        self._stuck = stuck
        self._kill()
        return True

    def _stacks(self) -> str:
        """As the child's own thread for this writes them; where C code keeps the interpreter's lock
        from it, as a handler in C does. That one reads stacks that nobody holds still: it crashed
        children whose threads went on."""

        def ask() -> None:
            with suppress(BrokenPipeError):
                os.write(self._ask, b".")

        written = self._written_after(ask)
        if not written and self._process.poll() is None:
            self._read_unheld = True
            written = self._written_after(lambda: self._process.send_signal(signal.SIGUSR1))
        return written

    def _written_after(self, asking: Callable[[], None]) -> str:
        size = os.fstat(self._dump.fileno()).st_size
        asking()
        end, written = time.monotonic() + _DUMP_S, size
        while time.monotonic() < end:
            time.sleep(0.05)
            before, written = written, os.fstat(self._dump.fileno()).st_size
            if size < before == written or self._process.poll() is not None:
                break
        return os.pread(self._dump.fileno(), 1 << 20, size).decode(errors="replace")

    def _home(self) -> str:
        return str(self._stage.get("home", ""))

    def _lost(self, item: Item) -> Verdict:
        """What to say of the item whose child is gone."""
        verdict = Verdict(item, source=str(self._stage.get("source", "")))
        if self._stuck is not None:
            verdict.outcome, verdict.message = told(self._stuck, self._timeout_s, self._doing())
            return verdict
        code = self._process.wait()
        crashed_by_us = self._read_unheld and code == -signal.SIGSEGV
        if self._stage["stage"] in ("start", "prepare") or crashed_by_us:
            verdict.outcome = Outcome.UNKNOWN
            verdict.message = f"the rehearsal itself ended: {_ending(code)}{self._last_line()}"
            return verdict
        verdict.outcome = Outcome.FAULT
        verdict.message = f"ends the whole process while {self._doing()}: {_ending(code)}"
        stacks = read_dump(os.pread(self._dump.fileno(), 1 << 20, 0).decode(errors="replace"))
        where = standstill(stacks, self._home())
        if where.kind is not Kind.NOWHERE:
            verdict.message += f" (at {where.where})"
        return verdict

    def _doing(self) -> str:
        return "it is loaded" if self._stage["stage"] == "load" else "it is called"

    def _printed(self) -> str:
        # The child writes through the same open file: reading must not move its place.
        text = os.pread(self._output.fileno(), 1 << 22, self._shown)
        self._shown += len(text)
        return text.decode(errors="replace").strip()[-_PRINTED_CHARACTERS:]

    def _last_line(self) -> str:
        text = os.pread(self._output.fileno(), 1 << 22, self._shown).decode(errors="replace")
        lines = text.strip().splitlines()
        return f" ({lines[-1]})" if lines else ""

    def _kill(self) -> None:
        # The whole session: user code may have started processes of its own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def told(stuck: Standstill, timeout_s: float, doing: str) -> tuple[Outcome, str]:
    """Outcome and message for a hook that does not come back."""
    after = f"after {timeout_s:g} s, while {doing}"
    if stuck.kind is not Kind.USER:
        what = {
            Kind.NOWHERE: "has not come back",
            Kind.OUTSIDE: "still waits for a connection or another process",
            Kind.LIBRARY: "is still inside a library",
            Kind.IMPORT: "still imports a library",
        }[stuck.kind]
        return Outcome.UNKNOWN, f"{what} {after} (at {stuck.where})"
    return Outcome.FAULT, f"hangs: it does not come back {after} (at {stuck.where})"


def _read(verdict: dict[str, Any]) -> Verdict:
    return Verdict.from_dict(verdict)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _environment() -> dict[str, str]:
    package_parent = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    # Small inputs: threads of a numeric library would only get in each other's way.
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
