"""How much faster a run is whose generation goes on during training: max_lag 1 and 2 against 0.

    python -m benchmarks.async_lag [--out FILE.json] [--rounds 3] [--steps 8]

One workload, run with each lag in turn, round after round, so that what else the machine does falls
on all of them; the median of the ratios within rounds counts. Generation is long-tailed: a generate
function makes each answer with the engine and then waits log-normally long, as a tool or a slow
judge would (seeded by the sample's index, so that every run waits for the same answers equally
long).

Training has to cost as much as generation, else there is nothing to hide either behind: a first
run without a lag measures a step's generation, and the time that its training lacks to that is
slept in a function of the run's own (rollout_data_postprocess), which runs in the thread that
trains. Sleeping takes no processor from the engine, as with trainer and engine on devices of their
own. What both compute on the same two processors comes on top, and is in the figures.

With a step's generation G (its longest answer) and training T a step takes G + T at lag 0, and at
lag 1 the longer of T and (G + T) / 2: two times as fast at the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from dovetail.cli.main import main as dovetail
from tests.loop.tiny import make_model, make_rows, read_metrics

USER = """
import asyncio
import random
import time


async def slow(call):
    made = await call.default(call.sample, call.sampling)
    await asyncio.sleep(random.Random(made.index).lognormvariate({mu}, {sigma}))
    return made


def reward(sample):
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def rest(args, rollout_id, rollout_data):
    time.sleep({train_s})
"""
GROUPS, SIBLINGS = 8, 4
MU, SIGMA = -1.0, 1.0
"""Of the waits: a median of 0.37 s, and for the longest of 32 about 3 s."""


class Workload:
    """A model, prompts, and runs over them."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        make_model(path / "model")
        make_rows(path / "rows.jsonl")

    def run(self, name: str, max_lag: int, train_s: float) -> dict[str, float]:
        """Seconds per step, of generation alone and of training, and the lag of the samples."""
        user = self.path / f"{name}.py"
        text = USER.format(mu=MU, sigma=SIGMA, train_s=train_s)
        user.write_text(text, encoding="utf-8")
        run_dir = self.path / name
        flags: list[Any] = ["--hf-checkpoint", self.path / "model", "--run-dir", run_dir]
        flags += ["--prompt-data", self.path / "rows.jsonl", "--label-key", "label"]
        flags += ["--custom-generate-function-path", f"{user}:slow"]
        flags += ["--custom-rm-path", f"{user}:reward", "--max-lag", max_lag]
        flags += ["--rollout-data-postprocess-path", f"{user}:rest", "--no-check-hooks"]
        flags += ["--num-rollout", self.steps, "--rollout-batch-size", GROUPS, "--lr", 1e-4]
        flags += ["--n-samples-per-prompt", SIBLINGS, "--rollout-max-response-len", 16]
        flags += ["--device", "cpu", "--num-threads", 1, "--no-use-tensorboard"]
        flags += ["--progress", "plain"]
        code = dovetail(["train", *map(str, flags)])
        if code != 0:
            raise SystemExit(f"the run {name} ended with {code}")
        rows = read_metrics(run_dir)[1:]
        found = {
            "step_s": statistics.mean(row["time/step_s"] for row in rows),
            "rollout_s": statistics.mean(row["time/rollout_s"] for row in rows),
            "train_s": statistics.mean(row["time/train_s"] for row in rows),
        }
        if max_lag:
            found["lag_mean"] = statistics.mean(row["rollout/lag_mean"] for row in rows)
            found["lag_max"] = max(row["rollout/lag_max"] for row in rows)
            found["stale_groups"] = sum(row["rollout/stale_groups"] for row in rows)
        return found


def measure(path: Path, rounds: int, steps: int, lags: tuple[int, ...]) -> dict[str, Any]:
    """Everything that is reported."""
    workload = Workload(path, steps)
    alone = workload.run("alone", 0, 0.0)
    train_s = max(0.0, alone["rollout_s"] - alone["train_s"])
    runs: dict[int, list[dict[str, float]]] = {lag: [] for lag in lags}
    for turn in range(rounds):
        for lag in lags:
            runs[lag].append(workload.run(f"lag-{lag}-{turn}", lag, train_s))
            print(f"round {turn + 1}, lag {lag}: {runs[lag][-1]['step_s']:.2f} s/step", flush=True)
    medians = {lag: _medians(found) for lag, found in runs.items()}
    # Of runs next to each other: what else the machine does changes from round to round.
    ratios = {
        lag: [one["step_s"] / own["step_s"] for one, own in zip(runs[0], found, strict=True)]
        for lag, found in runs.items()
    }
    speedup = {lag: statistics.median(found) for lag, found in ratios.items()}
    return {
        "alone": alone,
        "train_sleep_s": train_s,
        "lags": medians,
        "speedup": speedup,
        "ratios": ratios,
    }


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in found) for name in found[0]}


def main(argv: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), args.rounds, args.steps, (0, 1, 2))
    for lag, own in found["lags"].items():
        shown = ", ".join(f"{name} {value:.2f}" for name, value in own.items())
        print(f"lag {lag}: {found['speedup'][lag]:.2f}x  ({shown})")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["speedup"][1] >= 1.6 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
