"""Runs a plan of training runs, and kills some of them with SIGKILL at random moments.

    python kill_driver.py PLAN.json

First one run that nobody disturbs (`whole`). Then one that is killed `chain_kills` times, each time
resumed with --load, and after the last kill left alone (`chain`). Then `single_kills` runs that are
killed once and resumed (`single-0`, ...). Every attempt is a child process, forked from one that
has the libraries loaded, so that attempts are short.

A moment is a step and a place in it, both random; the blow falls a random time after the run came
there. The child tells where it is through shared memory, which outlives it, so the place that is
reported is the one where it died. It waits to be killed rather than pass its moment. Prints one
JSON line: the places, and how many kills left an unfinished checkpoint behind.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Loaded once, before the forks.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import dovetail.engines.embedded.engine
import dovetail.run.train  # noqa: F401
from dovetail.cli.main import main
from dovetail.run.parts import Run

PLACES = ("start", "rollout", "train", "report_step", "evaluate", "save", "finish")
AIMS = ("save", "rollout", "train", "save", "start", "save", "train", "evaluate")
"""Taken in turns, so that every kind of moment is struck."""
LEFTOVER = ".unfinished-"
_NEVER = 1 << 30


class Witness:
    """Where a child is, in memory that it shares with its parent.

    It holds the step, the place, the seconds that the last visit of each place took, and the step
    after which the child waits to be killed.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * (3 + len(PLACES)))
        self.blow: tuple[int, str, float] | None = None
        """Step and place in which the next child kills itself, and after which share of the time
        that the last visit there took: a parent that shares its processor comes too late."""
        self.clear(_NEVER)

    def clear(self, hold_after: int) -> None:
        """Before a child starts."""
        struct.pack_into("qqq", self._memory, 0, 0, 0, hold_after)

    def where(self) -> tuple[int, str]:
        """Step and place."""
        step, place = struct.unpack_from("qq", self._memory, 0)
        return step, PLACES[place]

    def seconds(self, place: str) -> float:
        """How long the last visit of a place took."""
        return struct.unpack_from("d", self._memory, 8 * (3 + PLACES.index(place)))[0]

    def enter(self, step: int, place: str) -> None:
        """The child is there now."""
        struct.pack_into("qq", self._memory, 0, step, PLACES.index(place))
        if self.blow is not None and self.blow[:2] == (step, place):
            delay_s = self.blow[2] * self.seconds(place)
            threading.Thread(target=_strike_down, args=(delay_s,), daemon=True).start()
        hold_after = struct.unpack_from("q", self._memory, 16)[0]
        while step > hold_after or (place == "finish" and hold_after < _NEVER):
            time.sleep(1.0)

    def leave(self, place: str, seconds: float) -> None:
        """The child has been there."""
        struct.pack_into("d", self._memory, 8 * (3 + PLACES.index(place)), seconds)


def _strike_down(delay_s: float) -> None:
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


def watch(witness: Witness) -> None:
    """Let every station of the loop in this process report to the witness."""
    step_of: dict[str, Callable[[Run, tuple[Any, ...]], int]] = {
        "rollout": lambda run, args: args[0],
        "train": lambda run, args: run.position[0],
        "report_step": lambda run, args: args[0] - 1,
        "evaluate": lambda run, args: max(args[0] - 1, 0),
        "save": lambda run, args: args[0] - 1,
        "finish": lambda run, args: args[0],
    }

    def watched(place: str, station: Callable[..., Any]) -> Callable[..., Any]:
        def call(run: Run, *args: Any) -> Any:
            witness.enter(step_of[place](run, args), place)
            started = time.perf_counter()
            try:
                return station(run, *args)
            finally:
                witness.leave(place, time.perf_counter() - started)

        return call

    for place in PLACES[1:]:
        setattr(Run, place, watched(place, getattr(Run, place)))


@dataclass
class Driver:
    """Starts, kills and resumes runs of one plan."""

    workdir: Path
    flags: list[str]
    num_steps: int
    rng: random.Random
    witness: Witness
    start_s: float = 1.0

    def launch(self, name: str, load: bool, hold_after: int = _NEVER) -> int:
        """Fork a child that trains; its process id."""
        self.witness.clear(hold_after)
        run_dir = self.workdir / name
        places = ["--run-dir", str(run_dir), "--save-hf", str(run_dir.with_name(f"{name}-model"))]
        places += ["--load", str(run_dir / "checkpoints")] if load else []
        pid = os.fork()
        if pid:
            return pid
        log = os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        watch(self.witness)
        os._exit(main(["train", *self.flags, *places, "--traceback"]))

    def run(self, name: str, load: bool = False) -> None:
        """A run that is left alone."""
        started = time.perf_counter()
        pid = self.launch(name, load)
        while self.witness.where()[1] == "start" and not _ended(pid):
            time.sleep(0.001)
        self.start_s = min(self.start_s, time.perf_counter() - started)
        self._wait(pid, name)

    def kill(self, name: str, load: bool, step: int, aim: str) -> str:
        """Start a run and kill it in step `step`; the place where it died."""
        share = self.rng.uniform(0.0, 0.7)
        self.witness.blow = None if aim == "start" else (step, aim, share)
        pid = self.launch(name, load, hold_after=step)
        self.witness.blow = None
        if aim == "start":
            time.sleep(self.rng.uniform(0.0, self.start_s))
        else:
            self._await_past(pid, step)
        if _ended(pid) not in ([], [signal.SIGKILL]):
            raise SystemExit(f"{name} ended by itself: {_tail(self.workdir / name)}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return self.witness.where()[1]

    def _await_past(self, pid: int, step: int) -> None:
        """Until the child is over, or past the step without having been in its place."""
        while self.witness.where()[0] <= step and not _ended(pid):
            time.sleep(0.001)

    def moments(self, count: int) -> list[tuple[int, str]]:
        """Steps in order, each with a place."""
        steps = sorted(self.rng.randrange(self.num_steps) for _ in range(count))
        aims = [AIMS[i % len(AIMS)] for i in range(count)]
        self.rng.shuffle(aims)
        return list(zip(steps, aims, strict=True))

    def unfinished(self, name: str) -> bool:
        """Whether the kill left a checkpoint half written."""
        checkpoints = self.workdir / name / "checkpoints"
        return any(checkpoints.glob(f"{LEFTOVER}*"))

    def _wait(self, pid: int, name: str) -> None:
        while not (ended := _ended(pid)):
            time.sleep(0.01)
        if ended[0] != 0:
            raise SystemExit(f"{name} failed: {_tail(self.workdir / name)}")


def _ended(pid: int) -> list[int]:
    """[exit code] of a child that is over, [] of a living one."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return [] if info is None else [info.si_status]


def _tail(run_dir: Path) -> str:
    return run_dir.with_suffix(".log").read_text(encoding="utf-8")[-3000:]


def drive(plan: dict[str, Any]) -> dict[str, Any]:
    """Work a plan off."""
    get_checkpoint_conversion_mapping("qwen3")  # Half a second, once instead of in every child.
    rng = random.Random(plan["seed"])
    driver = Driver(Path(plan["workdir"]), plan["flags"], plan["num_steps"], rng, Witness())
    died_in: Counter[str] = Counter()
    unfinished = 0
    driver.run("whole")

    def strike(name: str, load: bool, step: int, aim: str) -> None:
        nonlocal unfinished
        place = driver.kill(name, load, step, aim)
        died_in[place] += 1
        unfinished += place == "save" and driver.unfinished(name)

    for number, (step, aim) in enumerate(driver.moments(plan["chain_kills"])):
        strike("chain", number > 0, step, aim)
    names = ["chain"]
    driver.run("chain", load=True)
    for number, (step, aim) in enumerate(driver.moments(plan["single_kills"])):
        names.append(f"single-{number}")
        strike(names[-1], False, step, aim)
        driver.run(names[-1], load=True)
    return {"died_in": died_in, "unfinished": unfinished, "names": names}


if __name__ == "__main__":
    print(json.dumps(drive(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
