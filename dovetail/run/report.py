"""What one step leaves for a person: metrics, a line, the samples; and what a whole run returns."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.config.resolve import Resolved
from dovetail.config.sections import ObserveConfig
from dovetail.config.show import to_toml
from dovetail.observe.atomic import write_atomic
from dovetail.observe.dump import write_samples
from dovetail.observe.log import open_log, warn_once
from dovetail.observe.plot import plot_reward
from dovetail.observe.progress import make_progress
from dovetail.observe.run_dir import RunDir
from dovetail.observe.trace import wall_time
from dovetail.observe.trace_file import Phase, Tracks, write_trace
from dovetail.observe.tracker import Trackers, TrackerSetup, open_trackers
from dovetail.observe.trackers.jsonl import supersede_rows
from dovetail.runtime.fleet import EngineFacts
from dovetail.types import DataError, EvalOutput, Group, RolloutOutput, Sample

log = logging.getLogger(__name__)


class Timer:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.spans: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.phases[name] = self.phases.get(name, 0.0) + seconds
            self.spans.append(Phase(name, wall_time(started), seconds))

    def metrics(self) -> dict[str, float]:
        """`time/<phase>_s` of every phase, and `time/step_s` since the timer was made."""
        phases = {f"time/{name}_s": seconds for name, seconds in self.phases.items()}
        return {**phases, "time/step_s": time.perf_counter() - self._started}


@dataclass(frozen=True)
class RunReport:
    """How a run ended."""

    run_dir: Path
    steps_done: int
    num_steps: int
    exit_code: int = 0
    """0, or 128 plus the number of the signal that ended the run early."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of every metric."""
    exported: Path | None = None
    """Hugging Face directory of the trained policy."""
    engines: tuple[EngineFacts, ...] = ()
    """Those that had processes of their own."""


def step_metrics(
    groups: list[Group],
    rollout: Mapping[str, float],
    train: Mapping[str, float],
    timer: Timer,
) -> dict[str, float]:
    """Everything that is logged for one step.

    `perf/rollout_tokens_per_s` counts response tokens over the seconds of the rollout phase, and
    `perf/train_tokens_per_s` prompt and response tokens over those of training.
    """
    samples = [sample for group in groups for sample in group]
    times = timer.metrics()
    metrics = {**rollout, **train, **times}
    if times.get("time/rollout_s"):
        made = sum(sample.response_length for sample in samples)
        metrics["perf/rollout_tokens_per_s"] = made / times["time/rollout_s"]
    if train and times.get("time/train_s"):
        seen = sum(len(sample.tokens) for sample in samples)
        metrics["perf/train_tokens_per_s"] = seen / times["time/train_s"]
    return metrics


def tracker_names(observe: ObserveConfig) -> list[str]:
    """The trackers that a configuration asks for."""
    asked = {"jsonl": True, "tensorboard": observe.use_tensorboard, "wandb": observe.use_wandb}
    return [*(name for name, on in asked.items() if on), *observe.trackers]


def engines_line(engines: Sequence[EngineFacts]) -> str:
    """Which engines served, for a person."""
    restarts = sum(one.restarts for one in engines)
    shares = ", ".join(
        f"{one.name}{' (left)' if one.left else ''} {one.answered}" for one in engines
    )
    return f"requests answered: {shares}; engines started anew: {restarts}"


class Reporter:
    """Writes what a run leaves, into its run directory and onto the screen."""

    def __init__(self, resolved: Resolved, run_dir: RunDir, num_steps: int | None) -> None:
        self.config, self.run_dir, self._resolved = resolved.config, run_dir, resolved
        self.last: dict[str, float] = {}
        self.failed_saves = 0
        self._optimizer_steps = self._failed_rewards = 0.0
        self._log = open_log(run_dir.log)
        self._progress = make_progress(self.config.observe.progress, num_steps)
        self._trackers: Trackers | None = None

    def start(self, resumed_after: int | None, evaluated: bool = False) -> None:
        """Write down the configuration and open the trackers; rows and samples of an abandoned
        future are moved aside first.
        """
        # Not earlier: a resume that is refused leaves the run's own configuration in place.
        self._write_config()
        observe = self.config.observe
        if resumed_after is not None:
            supersede_rows(self.run_dir, resumed_after, evaluated)
            self.run_dir.supersede_samples(resumed_after + 1)
        setup = TrackerSetup(
            self.run_dir,
            observe.run_name,
            self.config.model_dump(),
            resumed_after=resumed_after,
            wandb_project=observe.wandb_project,
            wandb_group=observe.wandb_group,
            wandb_mode=observe.wandb_mode,
        )
        self._trackers = open_trackers(tracker_names(observe), setup)
        if resumed_after:
            self._progress.resumed(resumed_after)

    def rewound(self, done: int, evaluated: bool) -> None:
        """The run goes on after `done` steps, as if it had been resumed there."""
        if self._trackers is not None:
            self._trackers.close()
        self.start(done, evaluated)

    def rollout_progress(self, done: int, total: int, tokens: int) -> None:
        """Groups of the current step."""
        self._progress.rollout(done, total, tokens)

    def train_progress(self, done: int, total: int) -> None:
        """Samples of the current step."""
        self._progress.train(done, total)

    def eval_progress(self, done: int, total: int, tokens: int) -> None:
        """Groups of the current evaluation."""
        self._progress.evaluation(done, total, tokens)

    def samples(self, rollout_id: int, output: RolloutOutput) -> None:
        """Write a step's samples where the configuration wants them."""
        samples = [sample for group in output.samples for sample in group]
        self._keep(self.run_dir.samples(rollout_id + 1), samples)
        template = self.config.debug.save_debug_rollout_data
        if template is not None:
            write_samples(Path(template.format(rollout_id=rollout_id)), samples)

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Log one finished step."""
        if self.failed_saves:
            metrics = {**metrics, "checkpoint/failed_saves": float(self.failed_saves)}
        metrics = _numbers(metrics)
        self._optimizer_steps += metrics.get("train/optimizer_steps", 0.0)
        self._failed_rewards += metrics.get("reward/failed", 0.0)
        self._track(done, metrics)
        self._progress.step(done, metrics)

    def trace(self, done: int, groups: Iterable[Group], timer: Timer) -> None:
        """Write what happened when in the step, if the configuration asks for it."""
        named = ((f"group {group[0].group_index}", group) for group in groups if group)
        self._trace(self.run_dir.trace(done), named, timer)

    def mismatch(self, done: int, tokens: Sequence[Any]) -> None:
        """Write the tokens of a step that trainer and engine disagree on most (dataclasses), a line
        each. That they can't be written costs no training."""
        if not tokens or not self.config.observe.save_samples:
            return
        path = self.run_dir.mismatch(done)
        lines = [json.dumps(dataclasses.asdict(token)) + "\n" for token in tokens]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, "".join(lines).encode())
        except OSError as error:
            warn_once(log, "the mismatch of trainer and engine is not kept: %s", error)

    def evaluation(self, done: int, output: EvalOutput, timer: Timer) -> None:
        """Log one evaluation."""
        metrics = _numbers({**output.metrics, "time/eval_s": timer.phases["eval"]})
        self._track(done, metrics)
        self._progress.evaluated(done, metrics)
        for name, samples in output.data.items():
            if samples:
                self._keep(self.run_dir.eval_samples(name, done), samples)
        self._trace(self.run_dir.eval_trace(done), output.data.items(), timer)

    def saved(self, done: int, path: Path) -> None:
        """A checkpoint was written."""
        log.info("saved step %d to %s", done, path)

    def failed_save(self, error: Exception) -> None:
        """A checkpoint could not be written and the run goes on without it."""
        self.failed_saves += 1
        log.error("a checkpoint is missing: %s", error)

    def finished(self, report: RunReport) -> None:
        """The run is over."""
        facts: dict[str, Any] = {
            "steps_done": report.steps_done,
            "num_steps": report.num_steps,
            "exit_code": report.exit_code,
            "exported": str(report.exported) if report.exported else None,
        }
        if report.engines:
            facts["engines"] = [dataclasses.asdict(one) for one in report.engines]
        plot_reward(self.run_dir.path, self.run_dir.reward_png)
        write_atomic(self.run_dir.result, (json.dumps(facts, indent=2) + "\n").encode())
        early = "" if report.steps_done >= report.num_steps else " (stopped early)"
        self._progress.close()
        self._progress.say(
            f"done: {report.steps_done} of {report.num_steps} steps{early}, "
            f"everything is in {self.run_dir.path}"
        )
        if report.engines:
            self._progress.say(engines_line(report.engines))
        if self._failed_rewards and not self._optimizer_steps:
            log.warning(
                "nothing was learned: no sample had a reward to learn from, %d rewards failed "
                "(reward/failures/... in %s says why)",
                self._failed_rewards,
                self.run_dir.metrics,
            )
        if report.exported is not None:
            self._progress.say(f"exported the model to {report.exported}")

    def say(self, text: str) -> None:
        """One line for a person."""
        self._progress.say(text)

    def tell_where(self) -> None:
        """Say where everything is."""
        self._progress.close()
        self._progress.say(f"everything is in {self.run_dir.path}")

    def close(self) -> None:
        """Give the terminal back and close the files; a second call does nothing."""
        self._progress.close()
        if self._trackers is not None:
            self._trackers.close()
        self._log.close()

    def _write_config(self) -> None:
        text = to_toml(self._resolved).encode()
        self.run_dir.supersede_config(text)
        write_atomic(self.run_dir.config, text)
        origins = json.dumps(self._resolved.origins, indent=1)
        write_atomic(self.run_dir.origins, origins.encode())
        for note in self._resolved.notes:
            log.info("%s", note)

    def _keep(self, path: Path, samples: list[Sample]) -> None:
        """Write samples for a person to read. That they can't be written costs no training."""
        if not self.config.observe.save_samples:
            return
        try:
            write_samples(path, samples)
        except (OSError, DataError) as error:
            warn_once(log, "samples are not kept: %s", error)

    def _trace(self, path: Path, tracks: Tracks, timer: Timer) -> None:
        """As `_keep`: that it can't be written costs no training."""
        if not self.config.observe.trace:
            return
        try:
            write_trace(path, tracks, timer.spans)
        except (OSError, TypeError) as error:
            warn_once(log, "a trace is not kept: %s", error)

    def _track(self, done: int, metrics: Mapping[str, float]) -> None:
        assert self._trackers is not None
        self._trackers.log(metrics, done)
        self.last.update(metrics)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers: users' functions may put anything in. What is left out is told,
    for a tracker that meets it would be lost."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = value if isinstance(value, int | float) else float(value)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            warn_once(log, "metric %s is not logged: it is a %s, no number", name, kind, key=name)
    return numbers
