"""A run on Ray whose processes are killed again and again: is a sample lost, or trained on twice?

    python benchmarks/kill_actors.py                              # every kind, 10 x kill -9 each
    python benchmarks/kill_actors.py --kinds trainer_rank_1 --kills 2 --json kills.json

Trains the arithmetic task's untrained model with two trainer ranks and two engines, while `kill -9`
hits one kind of process: a trainer rank, the actor of an engine, the engine itself. Each kill waits
until the run has finished a step since the last one. After the loss of a rank the trainer is
started anew from the last checkpoint; an engine is started anew with the weights of now. The run
itself (`driver`) and the parts of its cluster (`raylet`, `gcs_server`) end it: each such kill has a
run of its own.

Exits with 1 unless every run ended well (or, where it could not, with an error), every sample of
every step was trained on exactly once, and no process was left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dovetail.engines.process import processes_below  # noqa: E402

MENDED = ("trainer_rank_0", "trainer_rank_1", "engine_1_seat", "engine")
"""Processes that a run outlives."""
FATAL = ("driver", "raylet", "gcs_server")
"""Processes that a run of its own ends with."""
GROUPS, SIBLINGS = 4, 4
_GONE_S = 20.0


@dataclass
class Outcome:
    """What became of the runs in which one kind of process was killed."""

    kind: str
    kills: int = 0
    runs: int = 0
    steps: int = 0
    samples: int = 0
    lost: int = 0
    doubled: int = 0
    trainer_restarts: int = 0
    engine_restarts: int = 0
    left_running: list[str] = field(default_factory=list)
    repair_s: list[float] = field(default_factory=list)
    """From a kill to the next finished step, or to the end of the run."""
    problems: list[str] = field(default_factory=list)
    ray: str | None = None
    """Directory of the Ray of the latest run."""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.left_running or self.problems)


def words_of(pid: int) -> list[str]:
    """Program and arguments of a process."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word for word in raw.decode(errors="replace").split("\0") if word]


def victims(run: int, run_dir: Path, kind: str) -> list[int]:
    """The processes of one kind, of the run with this id."""
    if kind == "driver":
        return [run]
    found = []
    for pid in processes_below(run):
        words = words_of(pid)
        if not words:
            continue
        serves = words[1:3] == ["-m", "dovetail"] and "serve" in words
        is_part = Path(words[0]).name == kind
        acts = words[0].startswith("ray::") and _writes_to(pid) == run_dir / f"{kind}.log"
        if acts or (serves if kind == "engine" else kind in FATAL and is_part):
            found.append(pid)
    return found


def _writes_to(pid: int) -> Path | None:
    try:
        target = Path(os.readlink(f"/proc/{pid}/fd/1"))
    except OSError:
        return None
    return target.parent.parent / target.name if target.parent.name == "logs" else None


def command(task: Path, run_dir: Path, steps: int, kills: int) -> list[str]:
    """A run with two ranks and two engines."""
    return [
        *(sys.executable, "-m", "dovetail", "train", "examples/dr_grpo/run.toml"),
        *("--hf-checkpoint", str(task / "model"), "--prompt-data", str(task / "train.jsonl")),
        *("--run-dir", str(run_dir), "--mode", "disaggregated", "--num-rollout", str(steps)),
        *("--actor-num-gpus-per-node", "2", "--rollout-num-engines", "2", "--num-threads", "1"),
        *("--rollout-batch-size", str(GROUPS), "--n-samples-per-prompt", str(SIBLINGS)),
        *("--rollout-health-check-interval", "1", "--progress", "plain", "--device", "cpu"),
        *("--no-use-tensorboard", "--no-trace", "--save-interval", "1"),
        *("--max-trainer-restarts", str(kills)),
    ]


def steps_done(run_dir: Path) -> int:
    """Steps whose metrics are written."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def strike(process: subprocess.Popen[bytes], run_dir: Path, found: Outcome, rng: Any) -> None:
    """Kill one process when the run is at work, and wait until it is again, or has ended."""
    before = steps_done(run_dir)
    while process.poll() is None and not (
        before > 0 and (alive := victims(process.pid, run_dir, found.kind))
    ):
        time.sleep(0.1)
        before = steps_done(run_dir)
    if process.poll() is not None:
        return
    time.sleep(rng.uniform(0.0, 1.5))
    started = time.monotonic()
    os.kill(rng.choice(alive), signal.SIGKILL)
    found.kills += 1
    after = steps_done(run_dir)
    while process.poll() is None and steps_done(run_dir) <= after:
        time.sleep(0.1)
        after = min(after, steps_done(run_dir))
    found.repair_s.append(round(time.monotonic() - started, 1))
    print(f"{found.kind}: kill {found.kills}, {found.repair_s[-1]:.1f} s", flush=True)


def examine(run_dir: Path, found: Outcome) -> None:
    """Count what the run trained on."""
    seen: dict[int, int] = {}
    files = sorted((run_dir / "samples").glob("step_*.jsonl"))
    done = min(len(files), steps_done(run_dir))
    for file in files[:done]:
        for line in file.read_text(encoding="utf-8").splitlines():
            index = json.loads(line)["index"]
            seen[index] = seen.get(index, 0) + 1
    found.steps += done
    found.samples += sum(seen.values())
    found.lost += len(set(range(done * GROUPS * SIBLINGS)) - set(seen))
    found.doubled += sum(count - 1 for count in seen.values())
    text = (run_dir / "log.txt").read_text(encoding="utf-8", errors="replace")
    found.trainer_restarts += text.count("it is started anew")
    found.engine_restarts += text.count("is back")


def ray_of(run: int) -> str | None:
    """The directory of the Ray of a run that lives; other runs of the machine have others."""
    for pid in processes_below(run):
        if found := re.search(r"/\w+/dovetail-ray-\w+", " ".join(words_of(pid))):
            return found[0]
    return None


def left_of(directory: Path, ray: str | None, before: set[int]) -> list[str]:
    """Processes that name the run's directories, or its Ray, and are not older than it."""
    deadline = time.monotonic() + _GONE_S
    while True:
        left = []
        for one in Path("/proc").iterdir():
            if not one.name.isdigit() or int(one.name) in before:
                continue
            words = " ".join(words_of(int(one.name)))
            writes = _writes_to(int(one.name))
            ours = str(directory) in words or (ray is not None and f"{ray}/" in words)
            if ours or (writes is not None and directory in writes.parents):
                left.append(f"{one.name}: {words[:120]}")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def pids() -> set[int]:
    """Every process of now."""
    return {int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()}


def one_run(task: Path, directory: Path, found: Outcome, kills: int, rng: Any) -> None:
    """Train, kill so often, and look."""
    run_dir, fatal, before = directory / "run", found.kind in FATAL, pids()
    steps = 10_000 if fatal else 2 * kills + 2
    with open(directory / "out.txt", "wb") as out:
        process = subprocess.Popen(
            command(task, run_dir, steps, kills), cwd=ROOT, stdout=out, stderr=out
        )
        try:
            found.ray = None
            while found.ray is None and process.poll() is None:
                time.sleep(0.1)
                found.ray = ray_of(process.pid)
            for _ in range(kills):
                strike(process, run_dir, found, rng)
            code = process.wait(600)
        finally:
            process.kill()
    found.runs += 1
    said = (directory / "out.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
    wanted = {"driver": -signal.SIGKILL}.get(found.kind, 1 if fatal else 0)
    if code != wanted:
        found.problems.append(f"the run ended with {code}, not {wanted}: {said}")
    if fatal and found.kind != "driver" and "Traceback" in said:
        found.problems.append(f"the run ended with a traceback: {said}")
    examine(run_dir, found)
    found.left_running += left_of(directory, found.ray, before)


def kill(kind: str, kills: int, seed: int) -> Outcome:
    """Kill one kind of process so often."""
    from examples.arithmetic.make_task import make_task

    found, rng = Outcome(kind), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill-actors-") as name:
        task = Path(name) / "task"
        make_task(task, seed=0)
        for number in range(kills if kind in FATAL else 1):
            directory = Path(name) / str(number)
            directory.mkdir()
            one_run(task, directory, found, 1 if kind in FATAL else kills, rng)
    if found.kills < kills:
        found.problems.append(f"only {found.kills} of {kills} kills")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=MENDED + FATAL, default=MENDED + FATAL)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    outcomes = [kill(kind, arguments.kills, arguments.seed) for kind in arguments.kinds]
    facts = [asdict(one) for one in outcomes]
    print(json.dumps(facts, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0 if all(one.good for one in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
