"""The simulation beside real runs on this machine: the arithmetic example's model, untrained, so
that answers end by chance and their lengths have a tail.

    calibration   two sizes of step, run for real -> speeds of engine and trainer (least squares)
    prediction    other sizes of step, from those speeds and the lengths of the calibration
    error         predicted seconds per step / measured ones - 1, medians of all rounds

Runs take turns, so that whatever the machine does beside them it does to all. With a lag the engine
is replaced by a generate function that takes a fixed time per token (`sleeping_answers.py`): two
processes that compute on the few cores of one machine would measure how they share them, not what
the loop overlaps.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulated_engines import EngineSpeed
from benchmarks.simulated_lengths import Recorded
from benchmarks.simulated_run import simulate
from benchmarks.simulated_work import Machine, Work
from dovetail.config.resolve import resolve

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARM_UP = 10, 2
LIMIT = 48
TOKEN_S = 0.01
"""Of the generate function that sleeps."""


@dataclass(frozen=True)
class Case:
    """One size of run."""

    name: str
    groups: int
    samples: int
    more: tuple[str, ...] = ()
    max_lag: int = 0
    sleeps: bool = False
    calibrates: bool = False


CASES = (
    Case("4 x 4", 4, 4, calibrates=True),
    Case("16 x 8", 16, 8, calibrates=True),
    Case("8 x 4", 8, 4),
    Case("12 x 16", 12, 16),
    Case("sleeping, lag 0", 8, 8, sleeps=True, calibrates=True),
    Case("sleeping, lag 1", 8, 8, ("--max-lag", "1"), 1, sleeps=True),
    Case("sleeping, lag 4", 8, 8, ("--max-lag", "4"), 4, sleeps=True),
)


@dataclass(frozen=True)
class Measured:
    """One step of a real run."""

    rollout_s: float
    train_s: float
    publish_s: float
    end: float
    """Clock time when it was reported."""
    lengths: tuple[tuple[int, ...], ...]
    """By group."""

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(map(sum, self.lengths))

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(max, self.lengths))


def check_against_runs(json_path: str | None, rounds: int) -> int:
    """Run, predict, print the errors."""
    from examples.arithmetic.make_task import make_task

    found: dict[str, list[list[Measured]]] = {case.name: [] for case in CASES}
    with tempfile.TemporaryDirectory() as text:
        make_task(Path(text), seed=0)
        for turn, case in itertools.product(range(rounds), CASES):
            print(f"round {turn + 1} of {rounds}: {case.name}", file=sys.stderr)
            run_dir = Path(text) / f"run-{turn}-{case.name}"
            found[case.name].append(_run(case, Path(text), run_dir))
    rows = compare(found)
    print(table(rows))
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(found: dict[str, list[list[Measured]]]) -> list[dict[str, Any]]:
    """Predicted and measured seconds of a step, case by case."""
    cases = [case for case in CASES if found.get(case.name)]
    engine_of, trainer_of = {}, {}
    lengths = {}
    for sleeps in {case.sleeps for case in cases}:
        own = [case for case in cases if case.sleeps == sleeps and case.calibrates]
        steps = [step for case in own for run in found[case.name] for step in run]
        lengths[sleeps] = Recorded([group for step in steps for group in step.lengths])
        trainer_of[sleeps] = fitted_trainer(steps)
        slept = EngineSpeed(TOKEN_S, 0.0, max_running=1 << 20)
        engine_of[sleeps] = slept if sleeps else fitted_engine(steps)
    rows = []
    for case in cases:
        token_s, fixed_s, publish_s = trainer_of[case.sleeps]
        machine = Machine(
            engines=1,
            engine=engine_of[case.sleeps],
            trainer_groups=1,
            train_token_s=token_s,
            train_fixed_s=fixed_s,
            publish_s=publish_s,
            turns=case.max_lag == 0,
        )
        work = Work(
            lengths[case.sleeps],
            groups=case.groups,
            samples=case.samples,
            steps=STEPS * 10,
            warm_up=WARM_UP,
            max_lag=case.max_lag,
        )
        predicted = statistics.mean(
            simulate(machine, replace(work, seed=seed)).step_s for seed in range(3)
        )
        measured = statistics.median(s for run in found[case.name] for s in step_seconds(run))
        rows.append(
            {
                "case": case.name,
                "calibrates": case.calibrates,
                "measured_s": measured,
                "predicted_s": predicted,
                "error": predicted / measured - 1,
            }
        )
    return rows


def step_seconds(run: Sequence[Measured]) -> list[float]:
    """From report to report."""
    return [later.end - earlier.end for earlier, later in itertools.pairwise(run)]


def fitted_engine(steps: Sequence[Measured]) -> EngineSpeed:
    """rollout = base x the longest response + sequence x all tokens + prompt x groups."""
    made = [(step.longest, step.tokens, len(step.lengths)) for step in steps]
    base, sequence, prompt = _least_squares(made, [step.rollout_s for step in steps])
    return EngineSpeed(base, sequence, prompt)


def fitted_trainer(steps: Sequence[Measured]) -> tuple[float, float, float]:
    """Seconds per token, per step, and of a publish with what a step costs beside."""
    made = [(step.tokens, 1) for step in steps]
    token_s, fixed_s = _least_squares(made, [step.train_s for step in steps])
    return token_s, fixed_s, statistics.median(step.publish_s for step in steps)


def _least_squares(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """No cost below zero: such a one is left out, and the others are fitted anew. Relative errors
    count, so that small steps do."""
    weights = 1 / np.asarray(seconds)
    matrix = np.asarray(features, dtype=float) * weights[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        costs, *_ = np.linalg.lstsq(matrix[:, used], np.ones(len(seconds)), rcond=None)
        if min(costs) >= 0 or len(used) == 1:
            break
        used.pop(int(np.argmin(costs)))
    kept = dict(zip(used, costs, strict=True))
    return [max(0.0, float(kept.get(at, 0.0))) for at in range(matrix.shape[1])]


def _run(case: Case, task: Path, run_dir: Path) -> list[Measured]:
    from dovetail.run.train import run_training

    flags = [
        *("--hf-checkpoint", task / "model", "--prompt-data", task / "train.jsonl"),
        *("--input-key", "input", "--label-key", "label"),
        *("--custom-rm-path", f"{ROOT}/examples/arithmetic/reward.py:reward", "--dtype", "float32"),
        *("--device", "cpu", "--num-threads", 1, "--run-dir", run_dir),
        *("--rollout-batch-size", case.groups, "--n-samples-per-prompt", case.samples),
        *("--rollout-max-response-len", LIMIT, "--num-rollout", STEPS, "--lr", 0),
        *case.more,
    ]
    if case.sleeps:
        place = ROOT / "benchmarks" / "sleeping_answers.py"
        flags += ["--custom-generate-function-path", f"{place}:generate"]
    with contextlib.redirect_stdout(io.StringIO()):
        run_training(resolve([], list(map(str, flags))))
    return read_run(run_dir)[WARM_UP:]


def read_run(run_dir: Path) -> list[Measured]:
    """The steps of a run directory."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [_step(run_dir, line) for line in map(json.loads, lines) if "time/step_s" in line]


def _step(run_dir: Path, line: dict[str, Any]) -> Measured:
    groups: dict[int, list[int]] = {}
    file = run_dir / "samples" / f"step_{line['step']:06d}.jsonl"
    for text in file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(text)
        groups.setdefault(sample["group_index"], []).append(max(1, sample["response_length"]))
    return Measured(
        rollout_s=line["time/rollout_s"],
        train_s=line["time/train_s"],
        publish_s=line["time/publish_s"],
        end=line["time"],
        lengths=tuple(map(tuple, groups.values())),
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a person."""
    lines = [f"{'case':<18}{'measured':>10}{'predicted':>11}{'error':>8}"]
    for row in rows:
        mark = "  (its speeds were used)" if row["calibrates"] else ""
        lines.append(
            f"{row['case']:<18}{row['measured_s']:>8.3f} s{row['predicted_s']:>9.3f} s"
            f"{row['error']:>+8.1%}{mark}"
        )
    return "\n".join(lines)
