"""Runs both sides in turns and writes what came out; `vs_trl.py` is its command.

For each shape every (side, precision) is one worker process. They load together, then take turns:
in each round each does one whole GRPO step while the others wait, so that a machine that gets
slower or faster does so for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.report import OWN, PEER, Step, result, text
from benchmarks.shapes import SHAPES, Job, Settings, Shape, prompts_of
from benchmarks.worker import ROOT, Worker, WorkerError

PEER_VENV = ROOT / ".venvs" / "trl"
REQUIREMENTS = ROOT / "benchmarks" / "requirements-trl.txt"
MODULES = {OWN: "benchmarks.own_side", PEER: "benchmarks.trl_side"}
CONTENDERS = ((PEER, "default"), (OWN, "default"), (PEER, "float32"), (OWN, "float32"))
EXTRA_CONTENDERS = ((PEER, "bfloat16"),)
BUSY_LOAD = 0.5
BUSY_NOTE = "other work slows threads that wait for each other, up to 10x; look at cpu ratios"


def quick_shape(shape: Shape) -> Shape:
    """Half as many sequences but in `short`, and in `long_tail` two thirds of the limit; the share
    of long responses stays."""
    if shape.name == "short":
        return shape
    if shape.long_prompts:
        limit = shape.response_limit * 2 // 3
        return replace(shape, group_size=shape.group_size // 2, response_limit=limit)
    return replace(shape, prompts=shape.prompts // 2)


@dataclass
class Measured:
    """What the workers answered."""

    steps: list[Step] = field(default_factory=list)
    peaks: dict[tuple[str, str, str], float] = field(default_factory=dict)
    sides: dict[str, Any] = field(default_factory=dict)
    """Versions and precision that each side said it runs."""


def ensure_peer(python: Path | None) -> Path:
    """The interpreter that has TRL: the given one, or that of the venv made here."""
    if python is not None:
        return python
    interpreter = PEER_VENV / "bin" / "python"
    stamp = PEER_VENV / "made-from"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return interpreter
    print(f"making {PEER_VENV} from {REQUIREMENTS.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(PEER_VENV)], check=True)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted)
    return interpreter


def own_python() -> Path:
    """The repository's own environment where there is one, else the interpreter that runs this."""
    made_by_make = ROOT / ".venv" / "bin" / "python"
    return made_by_make if made_by_make.exists() else Path(sys.executable)


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and how busy the machine was before anything was measured."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def start(jobs: Sequence[tuple[str, Job]], peer: Path, directory: Path) -> list[Worker]:
    """One worker per job; gives them when all are loaded and waiting."""
    workers: list[Worker] = []
    for side, job in jobs:
        python = peer if side == PEER else own_python()
        log = directory / f"{side}_{job.shape.name}_{job.precision}.log"
        workers.append(Worker(python, MODULES[side], job.to_json(), job.settings.threads, log))
    return workers


def taken_step(side: str, job: Job, turn: int, answer: Mapping[str, Any]) -> Step:
    """A worker's answer as a step."""
    return Step(
        shape=job.shape.name,
        side=side,
        precision=job.precision,
        turn=turn,
        step_s=answer["step_s"],
        rollout_s=answer["rollout_s"],
        response_lens=tuple(answer["response_lens"]),
        facts={name: answer[name] for name in ("loss", "grad_norm", "entropy", "reward")},
        step_cpu_s=answer["step_cpu_s"],
        rollout_cpu_s=answer["rollout_cpu_s"],
    )


def line_of(step: Step) -> str:
    return (
        f"{step.shape:<14}{step.side + ' ' + step.precision:<18}"
        f"{step.tokens_per_s:>7.0f} tokens/s{step.rollout_s:>8.2f} s rollout"
        f"{step.step_s:>8.2f} s step{step.tokens:>7} tokens"
    )


def measure_shape(
    jobs: Sequence[tuple[str, Job]], warmup: int, rounds: int, peer: Path, measured: Measured
) -> None:
    """`warmup` rounds that don't count, then `rounds` that do: each is one step of every worker."""
    shape = jobs[0][1].shape
    workers = start(jobs, peer, Path(jobs[0][1].directory))
    pairs = list(zip(jobs, workers, strict=True))
    turns = [(turn, *pair) for turn in range(-warmup, rounds) for pair in pairs]
    try:
        for (side, job), worker in pairs:
            said = dict(worker.wait_for("ready"))
            said.pop("event")
            measured.sides[f"{side} {job.precision}"] = said
        for turn, (side, job), worker in turns:
            step = taken_step(side, job, turn, worker.step())
            counts = "warm-up" if turn < 0 else f"round {turn + 1}/{rounds}"
            print(f"{counts:<11}{line_of(step)}", flush=True)
            if turn >= 0:
                measured.steps.append(step)
        for (side, job), worker in pairs:
            measured.peaks[shape.name, side, job.precision] = worker.close()["peak_rss_mb"]
    finally:
        for worker in workers:
            worker.kill()


def make_inputs(directory: Path, shapes: Sequence[Shape], settings: Settings, steps: int) -> None:
    """Checkpoints and prompts that both sides read."""
    command = [str(own_python()), "-m", "benchmarks.checkpoint", str(directory / "checkpoints")]
    subprocess.run(
        [*command, "--seed", str(settings.seed)], check=True, cwd=ROOT, capture_output=True
    )
    for shape in shapes:
        rows = prompts_of(shape, steps, settings.seed)
        path = Job(shape, "default", steps, str(directory)).prompts_path
        path.write_text("".join(json.dumps({"input": row}) + "\n" for row in rows))


def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure everything that was asked for; gives the JSON document."""
    begin = time.perf_counter()
    facts: dict[str, Any] = {"machine": machine()}
    if facts["machine"]["load_before"] > BUSY_LOAD:
        print(f"warning: the machine is busy: {BUSY_NOTE}", file=sys.stderr)
    settings = Settings(threads=arguments.threads)
    warmup, rounds = (0, arguments.rounds or 1) if arguments.quick else (1, arguments.rounds or 3)
    shapes = [shape for shape in SHAPES if shape.name in arguments.shapes]
    shapes = [quick_shape(shape) for shape in shapes] if arguments.quick else shapes
    contenders = CONTENDERS if arguments.quick else CONTENDERS + EXTRA_CONTENDERS
    peer = ensure_peer(arguments.peer_python)
    make_inputs(directory, shapes, settings, warmup + rounds)
    measured = Measured()
    for shape in shapes:
        jobs = [
            (side, Job(shape, precision, warmup + rounds, str(directory), settings))
            for side, precision in contenders
        ]
        measure_shape(jobs, warmup, rounds, peer, measured)
    facts["precisions"] = measured.sides
    facts["settings"] = asdict(settings)
    facts["shapes"] = {shape.name: asdict(shape) for shape in shapes}
    facts |= {"quick": arguments.quick, "rounds": rounds, "warmup_rounds": warmup}
    facts["total_s"] = time.perf_counter() - begin
    return result(measured.steps, [shape.name for shape in shapes], measured.peaks, facts)


def main(argv: Sequence[str] | None = None) -> int:
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(prog="vs_trl.py", description="Dovetail beside TRL, in turns.")
    parser.add_argument(
        "--quick", action="store_true", help="one round, no warm-up, smaller steps: < 3 min"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--shapes", nargs="+", choices=names, default=names, help="only these shapes"
    )
    parser.add_argument("--rounds", type=int, help="counted rounds (default 3; 1 with --quick)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default 2)")
    parser.add_argument(
        "--peer-python", type=Path, help="interpreter that has TRL; default: made here"
    )
    parser.add_argument(
        "--keep", type=Path, help="keep checkpoints, prompts and logs in this directory"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            document = compare(arguments, arguments.keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="dovetail_bench_") as directory:
                document = compare(arguments, Path(directory))
    except WorkerError as error:
        print(f"vs_trl: {error}", file=sys.stderr)
        return 1
    print(text(document))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
        print(f"\nwritten to {arguments.json}")
    return 0
