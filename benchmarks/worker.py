"""How the comparison talks with its workers: one JSON object a line, over the worker's standard
streams.

    parent                        worker
      start ----------------------> loads, then `ready`
      "step" ---------------------> one whole GRPO step, then `step` with its times
      ...
      "close" --------------------> `closed` with its peak memory, and exits

A worker does nothing between its turns, so two sides never run at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]


class WorkerError(RuntimeError):
    """A worker ended or answered out of turn; its log has the reason."""


class Line:
    """The worker's end. Whatever libraries print goes to standard error, so answers stay clean."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, event: str, **facts: Any) -> None:
        self._out.write(json.dumps({"event": event, **facts}) + "\n")

    def wait_for_turn(self) -> bool:
        """True when a step is asked for, False when it is time to close."""
        return sys.stdin.readline().strip() == "step"


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (2^20 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise WorkerError("/proc/self/status has no VmHWM; peak memory needs Linux")


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, python: Path, module: str, job: str, threads: int, log: Path) -> None:
        threads_env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self.log = log
        self._log_file = log.open("w")
        self._process = subprocess.Popen(
            [str(python), "-m", module, job],
            cwd=ROOT,
            env={**os.environ, **threads_env, **offline, **quiet, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
        )

    def wait_for(self, event: str) -> Mapping[str, Any]:
        """The worker's next answer, which must be this one."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(
                f"worker ended before {event!r}; the end of {self.log}:\n{self._tail()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if answer["event"] != event:
            raise WorkerError(
                f"worker answered {answer['event']!r}, expected {event!r}: {self.log}"
            )
        return answer

    def step(self) -> Mapping[str, Any]:
        self._tell("step")
        return self.wait_for("step")

    def close(self) -> Mapping[str, Any]:
        self._tell("close")
        answer = self.wait_for("closed")
        self._process.wait(60)
        self._log_file.close()
        return answer

    def kill(self) -> None:
        """End the process whatever it does; for leaving after an error."""
        self._process.kill()
        self._process.wait()
        self._log_file.close()

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def _tail(self) -> str:
        self._process.wait(60)
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
