"""A run whose engines are killed again and again: is a sample lost, or trained on twice?

    python benchmarks/kill_engines.py                          # 3 embedded engines, 20 x kill -9
    python benchmarks/kill_engines.py --engine vllm --json kills.json

Trains the arithmetic task's untrained model on engines in processes of their own, while `kill -9`
hits one of them, drawn at random from those that take requests, every time all deaths before are
mended or `--patience` seconds are over. The run has as many steps as that takes: it is asked to
end (SIGTERM: its checkpoint is a whole number of steps) after the last repair and resumed for the
two steps that remain.

Exits with 1 unless the run ended well, every sample of every step was trained on exactly once, each
under the weights of its step, and each engine was last seen with the last version.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dovetail.engines.process import processes_below

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"embedded": "dovetail", "vllm": "vllm.entrypoints.openai.api_server"}
"""The module that an engine's process was started with."""
GROUPS, SIBLINGS = 8, 8
_MANY = 100_000


@dataclass
class Outcome:
    """What became of a run."""

    engine: str
    engines: int
    kills: int = 0
    steps: int = 0
    samples: int = 0
    lost: int = 0
    doubled: int = 0
    wrong_version: int = 0
    restarts: int = 0
    resent_requests: int = 0
    repair_s: list[float] = field(default_factory=list)
    """From a kill until as many engines as ever take requests again."""
    problems: list[str] = field(default_factory=list)


def engine_processes(pid: int, program: str) -> list[int]:
    """Of a run's engines, those that live."""
    found = []
    for child in processes_below(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # The keeper before it has the same words, and others before them.
        if words[1:3] == [b"-m", program.encode()]:
            found.append(child)
    return found


def command(task: Path, run_dir: Path, arguments: argparse.Namespace, *more: str) -> list[str]:
    """A run on the engines asked for."""
    return [
        *(sys.executable, "-m", "dovetail", "train", "examples/dr_grpo/run.toml"),
        *("--hf-checkpoint", str(task / "model"), "--prompt-data", str(task / "train.jsonl")),
        *("--run-dir", str(run_dir), "--rollout-engine", arguments.engine),
        *("--rollout-num-engines", str(arguments.engines), "--num-threads", "1"),
        *("--rollout-batch-size", str(GROUPS), "--n-samples-per-prompt", str(SIBLINGS)),
        *("--rollout-health-check-interval", "1", "--progress", "plain", "--device", "cpu"),
        *("--no-use-tensorboard", "--no-trace"),
        *more,
    ]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics so far."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [row for row in map(json.loads, lines) if "engines/ready" in row]


def restarts_logged(run_dir: Path) -> int:
    """How often an engine was let in again, as the log has it: metrics tell it once a step."""
    log = run_dir / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text.count("is back")


def kill_engines(
    process: subprocess.Popen[bytes], run_dir: Path, arguments: argparse.Namespace, found: Outcome
) -> None:
    """`kill -9`, as often as asked for, with a repair between two of them."""
    rng, program = random.Random(arguments.seed), PROGRAMS[arguments.engine]
    while found.kills < arguments.kills and process.poll() is None:
        alive = engine_processes(process.pid, program)
        if not rows(run_dir) or len(alive) < arguments.engines:
            time.sleep(0.1)
            continue
        time.sleep(rng.uniform(0.0, arguments.rest))
        before, started = restarts_logged(run_dir), time.monotonic()
        os.kill(rng.choice(alive), signal.SIGKILL)
        found.kills += 1
        while restarts_logged(run_dir) == before and process.poll() is None:
            if time.monotonic() - started > arguments.patience:
                break
            time.sleep(0.05)
        found.repair_s.append(round(time.monotonic() - started, 2))
        print(f"kill {found.kills}: mended after {found.repair_s[-1]:.1f} s", flush=True)


def examine(run_dir: Path, found: Outcome) -> None:
    """Count what the run trained on."""
    seen: dict[int, int] = {}
    for file in sorted((run_dir / "samples").glob("step_*.jsonl")):
        found.steps += 1
        version = str(int(file.stem.removeprefix("step_")) - 1)
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            seen[sample["index"]] = seen.get(sample["index"], 0) + 1
            found.wrong_version += set(map(str, sample["weight_versions"])) != {version}
    found.samples = sum(seen.values())
    wanted = found.steps * GROUPS * SIBLINGS
    found.lost = len(set(range(wanted)) - set(seen))
    found.doubled = sum(count - 1 for count in seen.values())
    everything = rows(run_dir)
    found.restarts = restarts_logged(run_dir)
    found.resent_requests = int(max(row["engines/resent_requests"] for row in everything))
    last = everything[-1]
    for number in range(found.engines):
        # What is logged with a step was published before it.
        if last.get(f"engines/{number}/weight_version") not in (found.steps, found.steps - 1):
            found.problems.append(f"engine {number} ended with other weights: {last}")


def run(arguments: argparse.Namespace) -> Outcome:
    """Train, kill, and look."""
    from examples.arithmetic.make_task import make_task

    found = Outcome(arguments.engine, arguments.engines)
    with tempfile.TemporaryDirectory() as directory:
        task, run_dir = Path(directory) / "task", Path(directory) / "run"
        make_task(task, seed=0)
        first = command(task, run_dir, arguments, "--num-rollout", str(_MANY))
        with open(Path(directory) / "out.txt", "wb") as out:
            process = subprocess.Popen(first, cwd=ROOT, stdout=out, stderr=out)
            try:
                kill_engines(process, run_dir, arguments, found)
                process.send_signal(signal.SIGTERM)
                code = process.wait(300)
            finally:
                process.kill()
            if code != 128 + signal.SIGTERM:
                found.problems.append(f"the run ended with {code}")
            steps = len(rows(run_dir))
            more = ("--num-rollout", str(steps + 2), "--load", str(run_dir))
            code = subprocess.call(
                command(task, run_dir, arguments, *more), cwd=ROOT, stdout=out, stderr=out
            )
        if code:
            found.problems.append((Path(directory) / "out.txt").read_text()[-2000:])
        examine(run_dir, found)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=sorted(PROGRAMS), default="embedded")
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rest", type=float, default=2.0, help="longest wait before a kill, in s")
    parser.add_argument("--patience", type=float, default=600.0, help="longest repair, in s")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    found = run(arguments)
    facts = asdict(found)
    print(json.dumps(facts, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    wrong = found.lost or found.doubled or found.wrong_version or found.kills < arguments.kills
    return 1 if wrong or found.problems else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
