"""Dovetail's side: the run's own loop, held between its steps, built from flags as a user would.

Precisions: `default` leaves `dtype` alone (bfloat16 weights, float32 masters and moments);
`float32` is `--dtype float32`. Micro-batches, engine and KV cache are sized by the defaults.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import Job, reward_of
from benchmarks.worker import Line, peak_rss_mb


def even_tokens(sample: Any) -> float:
    return reward_of(sample.tokens[len(sample.tokens) - sample.response_length :])


class Closed(Exception):
    """The parent wants no more steps."""


def flags_of(job: Job) -> list[str]:
    shape, settings = job.shape, job.settings
    values = {
        "hf-checkpoint": job.model_path,
        "prompt-data": job.prompts_path,
        "custom-rm-path": "benchmarks.own_side:even_tokens",
        "num-rollout": job.steps,
        "rollout-batch-size": shape.prompts,
        "n-samples-per-prompt": shape.group_size,
        "rollout-max-response-len": shape.response_limit,
        "rollout-temperature": settings.temperature,
        "eps-clip": settings.clip_low,
        "eps-clip-high": settings.clip_high,
        "lr": settings.learning_rate,
        "adam-beta1": settings.adam_beta1,
        "adam-beta2": settings.adam_beta2,
        "adam-eps": settings.adam_eps,
        "weight-decay": settings.weight_decay,
        "clip-grad": settings.clip_grad,
        "seed": settings.seed,
        "num-threads": settings.threads,
        "device": "cpu",
        "progress": "off",
        "run-dir": Path(tempfile.mkdtemp(prefix="dovetail_", dir=job.directory)) / "run",
    }
    if job.precision != "default":
        values["dtype"] = job.precision
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


class Turns:
    """Stands before a run's `rollout` and `report_step`: times them and holds the loop in between.

    A step lasts from the parent's word to the end of its report: rollout, training, publishing,
    samples and metrics written.
    """

    def __init__(self, line: Line, run: Any) -> None:
        self.line = line
        self._rollout, self._report_step = run.rollout, run.report_step
        self._rollout_cpu_s = 0.0
        run.rollout, run.report_step = self.rollout, self.report_step

    def wait(self) -> None:
        if not self.line.wait_for_turn():
            raise Closed
        self._begin, self._begin_cpu = time.perf_counter(), time.process_time()

    def rollout(self, rollout_id: int) -> Any:
        before = time.process_time()
        output = self._rollout(rollout_id)
        self._rollout_cpu_s = time.process_time() - before
        return output

    def report_step(self, done: int, output: Any, trained: dict[str, float], timer: Any) -> None:
        self._report_step(done, output, trained, timer)
        samples = [sample for group in output.samples for sample in group]
        self.line.send(
            "step",
            step_s=time.perf_counter() - self._begin,
            step_cpu_s=time.process_time() - self._begin_cpu,
            rollout_s=timer.phases["rollout"],
            rollout_cpu_s=self._rollout_cpu_s,
            response_lens=[sample.response_length for sample in samples],
            loss=trained["train/loss"],
            grad_norm=trained["train/grad_norm"],
            entropy=trained["train/entropy"],
            reward=sum(sample.reward for sample in samples) / len(samples),
        )
        self.wait()


def main() -> None:
    line = Line()
    job = Job.from_json(sys.argv[1])
    # First, as in a run: it sets how long waiting threads spin, which torch reads when it loads.
    import dovetail  # isort: skip
    import torch
    import transformers

    from dovetail.config.resolve import resolve
    from dovetail.run.build import build
    from dovetail.run.train import train

    with build(resolve([], flags_of(job))) as run:
        turns = Turns(line, run)
        position = run.resume()
        line.send(
            "ready",
            versions={
                "dovetail": dovetail.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            dtype=run.config.model.dtype,
        )
        with contextlib.suppress(Closed):
            turns.wait()
            train(run, *position)
    line.send("closed", peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
