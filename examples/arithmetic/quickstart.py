"""The main job in one command: warm a small model up, improve it by GRPO, show what came of it.

    make quickstart

Writes everything below outputs/quickstart/: the task, one run directory per stage, `reward.png` and
`result.json`. An earlier quickstart is moved aside, not overwritten.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from make_task import make_task

from dovetail.config.resolve import resolve
from dovetail.observe.plot import plot_reward, plot_run
from dovetail.observe.run_dir import RunDir
from dovetail.observe.trackers.jsonl import read_metrics, series
from dovetail.run.report import RunReport
from dovetail.run.train import run_training

HERE = Path(__file__).parent


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the task, the model and both runs"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument(
        "--num-rollout", type=int, default=None, help="GRPO steps instead of grpo.toml's"
    )
    options = parser.parse_args()
    _move_aside(options.output)
    task, warm = options.output / "task", options.output / "warm"
    print(f"Making the task in {task}: sums below 100, 512 of them held out\n")
    make_task(task, options.seed)

    print("1/2  Warm-up: supervised steps on worked examples")
    flags = ["--save-hf", str(warm)]
    report = _run("sft", options, task / "model", task / "sft.jsonl", flags)
    if report.exit_code:
        return report.exit_code
    print(
        "\n2/2  GRPO: 32 sums x 16 samples a step, reward by rule, evaluated on the held-out sums"
    )
    flags = ["--eval-prompt-data", "heldout", str(task / "heldout.jsonl")]
    flags += ["--save-hf", str(options.output / "model")]
    if options.num_rollout is not None:
        flags += ["--num-rollout", str(options.num_rollout)]
    started = time.perf_counter()
    report = _run("grpo", options, warm, task / "train.jsonl", flags)
    if report.exit_code:
        return report.exit_code
    _conclude(options, report.run_dir, time.perf_counter() - started)
    return 0


def _run(
    stage: str, options: argparse.Namespace, model: Path, data: Path, flags: list[str]
) -> RunReport:
    common = ["--hf-checkpoint", str(model), "--prompt-data", str(data)]
    common += ["--seed", str(options.seed), "--rollout-seed", str(options.seed)]
    common += ["--run-dir", str(options.output / stage)]
    return run_training(resolve([HERE / f"{stage}.toml"], [*common, *flags]))


def _move_aside(output: Path) -> None:
    if output.exists():
        n = 1
        while (aside := output.with_name(f"{output.name}.{n}")).exists():
            n += 1
        output.rename(aside)
        print(f"The earlier quickstart is now in {aside}")


def _conclude(options: argparse.Namespace, run_dir: Path, train_seconds: float) -> None:
    rows = read_metrics(RunDir(run_dir).metrics)
    _, heldout = series(rows, "eval/heldout/reward")
    picture = options.output / "reward.png"
    plot_reward(run_dir, picture)
    result = {
        "heldout_before": heldout[0],
        "heldout_after": heldout[-1],
        "train_seconds": round(train_seconds, 1),
        "seed": options.seed,
    }
    numbers = options.output / "result.json"
    numbers.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{plot_run(run_dir)}")
    print(f"""
Held-out accuracy (greedy, 512 sums never trained on):
  {heldout[0]:.3f} before GRPO, {heldout[-1]:.3f} after, in {train_seconds:.0f} s

  run directory   {run_dir}  (metrics.jsonl, samples/, checkpoints/, tensorboard/)
  reward curve    {picture}
  trained model   {options.output / "model"}  (loads in transformers)
  numbers         {numbers}

Three things to try next:
  1. See what it wrote:     head -1 {RunDir(run_dir).samples(1)}
  2. Change the reward:     edit examples/arithmetic/reward.py, then make quickstart
  3. Train your own model:  .venv/bin/dovetail train --hf-checkpoint DIR \\
                              --prompt-data FILE.jsonl --label-key label --rm-type math \\
                              --n-samples-per-prompt 8 --num-rollout 100""")


if __name__ == "__main__":
    sys.exit(main())
