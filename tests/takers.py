"""Engines' side of meetings, as processes that start within milliseconds: one process with torch
loaded forks each.

Reads a JSON object a line and answers each with one:

    {"meeting": {...}, "out": FILE, "dies_at": N}   -> {"pid": N}      a taker begins
    {"poll": N} -> {"code": null} or {"code": 0}                       negative: ended by a signal

A taker holds named tensors, zeros at first, takes what comes into them, and writes `{"tensors":
{name: digest}, "broken": message or null}`. With `dies_at` it kills itself (SIGKILL), or with
`stops_at` stands still (SIGSTOP), before it takes so many tensors.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dovetail.transport.hand_over import handed_over
from dovetail.transport.tensor_files import tensor_digest
from dovetail.types.errors import BrokenUpdateError
from dovetail.types.weights import Meeting


def take(meeting: Meeting, out: Path, at: int, signum: int) -> None:
    held: dict[str, str] = {}
    broken = None
    try:
        steps = handed_over(meeting, torch.device("cpu"), lambda *given: None, lambda: None)
        for number, (name, tensor) in enumerate(steps):
            if number == at:
                os.kill(os.getpid(), signum)
            held[name] = tensor_digest(tensor)
    except BrokenUpdateError as error:
        broken = str(error)
    out.write_text(json.dumps({"tensors": held, "broken": broken}))


def begin(work: Callable[[dict[str, Any]], None], asked: dict[str, Any]) -> int:
    """Fork a child that does it; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        work(asked)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """Answer what is asked on the standard input."""
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            found, status = os.waitpid(asked["poll"], os.WNOHANG)
            told: dict[str, Any] = {"code": os.waitstatus_to_exitcode(status) if found else None}
        else:
            told = {"pid": begin(work, asked)}
        print(json.dumps(told), flush=True)


def _take(asked: dict[str, Any]) -> None:
    at = asked.get("dies_at", asked.get("stops_at", -1))
    signum = signal.SIGKILL if "dies_at" in asked else signal.SIGSTOP
    take(Meeting(**asked["meeting"]), Path(asked["out"]), at, signum)


class Forks:
    """The process that forks them, seen from a test."""

    def __init__(self, place: Path, module: str, *arguments: str) -> None:
        self._place, self._number, self._lock = place, 0, threading.Lock()
        self.pids: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def fork(self, **asked: Any) -> tuple[int, Path]:
        """One more; its process, and the file that it will write."""
        self._number += 1
        out = self._place / f"fork_{self._number}.json"
        pid = self._ask({**asked, "out": str(out)})["pid"]
        self.pids.append(pid)
        return pid, out

    def kill(self, pid: int) -> None:
        """End one that still runs."""
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def wait(self, pid: int) -> int:
        """Its exit code."""
        while (code := self._ask({"poll": pid})["code"]) is None:
            threading.Event().wait(0.005)
        self.pids.remove(pid)
        return int(code)

    def close(self) -> None:
        """End them all."""
        for pid in list(self.pids):
            self.kill(pid)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def _ask(self, asked: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class Takers(Forks):
    """Of engines' sides."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, "tests.takers")

    def begin(self, meeting: Meeting, **more: int) -> tuple[int, Path]:
        """One more taker; its process, and the file that it will write."""
        return self.fork(meeting=asdict(meeting), **more)


if __name__ == "__main__":
    serve(_take)
