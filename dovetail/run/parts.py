"""The living parts of one run, and what the loop asks of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dovetail.checkpoint.manager import (
    CheckpointManager,
    Part,
    WritingPart,
)
from dovetail.checkpoint.rng import capture_rng
from dovetail.config.run import RunConfig
from dovetail.observe.run_dir import RunDir
from dovetail.observe.trace import recording_run
from dovetail.run.collecting import Collecting, meanwhile
from dovetail.run.interrupt import Interrupt
from dovetail.run.leaving import UserThreads, close_runner, wait_for
from dovetail.run.policy import POLICY, Policy
from dovetail.run.report import Reporter, RunReport, Timer, step_metrics
from dovetail.run.saving import Position, Saving
from dovetail.run.schedule import Schedule
from dovetail.run.serving import Served
from dovetail.runtime.fleet import Fleet
from dovetail.types import (
    CheckpointError,
    EvalOutput,
    RolloutOutput,
    Sample,
)
from dovetail.types.ports import DataSource, EngineControl
from dovetail.weights.publish import NamedTensors, publish

log = logging.getLogger(__name__)

Evaluate = Callable[[int], Awaitable[EvalOutput]]
LogRollout = Callable[[int, list[Sample], dict[str, Any], float], bool]
"""`(rollout_id, samples, metrics, seconds)`; true: the metrics are not logged."""
LogEval = Callable[[int, dict[str, dict[str, list[Any]]], dict[str, Any]], bool]
"""`(rollout_id, columns by set, metrics)`; true: the metrics are not logged."""


class Closing(Protocol):
    """A part that has connections."""

    async def close(self) -> None: ...


class ScorerPart(Protocol):
    """What the run needs of the scorer beside scoring."""

    def metrics(self) -> dict[str, float]: ...

    def close(self) -> None: ...


@dataclass
class Run:
    """Everything `build` made. A context: leaving it closes engines, workers and trackers."""

    config: RunConfig
    schedule: Schedule
    run_dir: RunDir
    reporter: Reporter
    checkpoints: CheckpointManager
    interrupt: Interrupt
    collecting: Collecting
    evaluator: Evaluate | None
    policy: Policy | None
    """None: nothing is trained."""
    to_rows: Callable[[Sequence[Sample]], list[Any]]
    compute: ThreadPoolExecutor
    """The thread that trains and decodes."""
    source: DataSource | None = None
    scorer: ScorerPart | None = None
    teacher: Closing | None = None
    engines: list[Any] = field(default_factory=list)
    close_cluster: Callable[[], None] = lambda: None
    """Ends what lives on a cluster, and that too if it is the run's own."""
    log_rollout: LogRollout | None = None
    log_eval: LogEval | None = None
    after_save: Callable[[int, str, str | None], Any] | None = None
    """`(rollout_id, checkpoint, export or None)`, when a checkpoint is there."""
    learn: Callable[..., None] = lambda **facts: None
    """Tells users' functions facts of the run, as attributes of their `args`."""
    check_hooks: Callable[[], None] = lambda: None
    """Raises when a user's function is overdue."""
    router: Served | None = None
    """The engine behind HTTP."""
    fleet: Fleet | None = None
    """The engines that have processes of their own."""
    named_tensors: Callable[[], NamedTensors] | None = None
    """The weights for engines that do not share the trainer's tensors."""
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    position: Position = (0, False)
    """Finished steps, and whether the evaluation due there is done: where a checkpoint would
    stand.
    """
    saved: Position | None = None
    """The position of the last checkpoint that was written or resumed from."""
    checkpoint: Path | None = None
    """That checkpoint."""
    beginning: tuple[Any, Part] | None = None
    """States of source and generators of a run that was not resumed, before its first step."""
    exported: Path | None = None
    """The last Hugging Face directory that was written."""
    _training: bool = False

    def __post_init__(self) -> None:
        self.saving = Saving(self.checkpoints, self._written)

    def __enter__(self) -> Run:
        self.interrupt.__enter__()
        self.runner.get_loop().set_default_executor(UserThreads())
        if self.router is not None and self.fleet is None:
            self.router.start(self.runner.get_loop())
        return self

    def start_policy(self) -> None:
        """Start the trainer's processes, where it has any."""
        if self.policy is not None:
            self.policy.start()

    def start_engines(self) -> None:
        """Start the engines that have processes of their own, and the server before them, unless
        they run.

        Raises:
            Interrupted: a signal came first; none of them is left.
        """
        if self.fleet is None or self.fleet.started:
            return
        starting = self.fleet.start(self.run_dir.engines, self.reporter.say)
        self.interrupt.run(self.runner, starting)
        if self.router is not None:
            self.router.serve_on(self.fleet.thread.loop)
            self.reporter.say(
                f"router at {self.router.url}; one more engine: dovetail serve MODEL --join "
                f"{self.router.url}"
            )

    def __exit__(self, *exc: object) -> None:
        if isinstance(exc[1], Exception):
            # INFO keeps it off the terminal, where whoever catches it tells it.
            log.info("the run failed: %s", exc[1], exc_info=exc[1])
        try:
            if self.router is not None:
                self.router.close()
            self.runner.run(self._close())
        finally:
            self._close_policy()
            close_runner(self.runner)
            self.reporter.close()
            self.interrupt.__exit__(*exc)

    async def _close(self) -> None:
        await self.collecting.close()
        for part in (*self.engines, *([] if self.teacher is None else [self.teacher])):
            await part.close()
        if self.scorer is not None:
            self.scorer.close()
        # What it works on after an error is a user's function that may never return.
        self.compute.shutdown(wait=not self._training, cancel_futures=True)

    def _close_policy(self) -> None:
        with ExitStack() as left:
            left.callback(self.close_cluster)
            if self.policy is not None:
                left.callback(self.policy.close)
            left.callback(self.saving.close)

    @property
    def between_steps(self) -> bool:
        """Whether the weights are no longer those of `position`."""
        return self._training and getattr(self.policy, "changed", True)

    def stands_at(self, done: int, evaluated: bool) -> None:
        """So far everything is whole: a checkpoint could be taken here."""
        self.position, self._training = (done, evaluated), False
        self.collecting.settled()

    def rewind(self) -> None:
        """Put the source back to where the step under way began."""
        self.collecting.rewind()

    def publish(self, done: int, always: bool = False) -> None:
        """Give the engines the weights after `done` steps, when it is their turn (or `always`)."""
        due = done % self.config.rollout.update_weights_interval == 0
        self.runner.run(self._publish(done, always or due or self.schedule.eval_due(done)))

    async def _publish(self, done: int, due: bool) -> None:
        controls = [engine for engine in self.engines if isinstance(engine, EngineControl)]
        if due and controls:
            self.collecting.updating()
            await publish(controls, done, self.named_tensors)
        self.collecting.advance(done, done if due else None)

    def rollout(self, rollout_id: int) -> RolloutOutput:
        """Collect the samples of one step; a signal meanwhile puts the source back where it was.

        Raises:
            Interrupted: a signal came before the step had its samples.
        """
        self.collecting.begins()
        started = time.perf_counter()
        try:
            output = self.interrupt.run(self.runner, self.collecting.take(rollout_id))
        except BaseException:
            self.rewind()
            raise
        if self.scorer is not None:
            output.metrics.update(self.scorer.metrics())
        self.reporter.samples(rollout_id, output)
        if self.log_rollout is not None:
            samples = [sample for group in output.samples for sample in group]
            if self.log_rollout(rollout_id, samples, output.metrics, time.perf_counter() - started):
                output.metrics = {}
        return output

    def train(self, output: RolloutOutput) -> dict[str, float]:
        """Train on one step's samples; nothing under --debug-rollout-only."""
        if self.policy is None:
            return {}
        rows = self.to_rows([sample for group in output.samples for sample in group])
        self._training = True
        trained = self.compute.submit(self.policy.train, rows, self.position[0])
        if self.collecting.goes_on:
            return self.runner.run(meanwhile(trained, self.check_hooks))
        return wait_for(trained, self.check_hooks)

    def evaluate(self, done: int) -> None:
        """Evaluate and log.

        Raises:
            Interrupted: a signal came first.
        """
        if self.evaluator is None:
            return
        evaluator, timer = self.evaluator, Timer()

        async def work() -> EvalOutput:
            with recording_run(self.config.observe.trace):
                return await evaluator(done)

        with timer.phase("eval"):
            output = self.interrupt.run(self.runner, work())
        if self.scorer is not None:
            self.scorer.metrics()
        if self.log_eval is not None and self.log_eval(done, output.columns, output.metrics):
            output.metrics = {}
        self.reporter.evaluation(done, output, timer)

    def report_step(
        self, done: int, output: RolloutOutput, trained: dict[str, float], timer: Timer
    ) -> None:
        """Log one finished step."""
        metrics = step_metrics(output.samples, output.metrics, trained, timer)
        if self.policy is not None and self.policy.restarts:
            metrics["trainer/restarts"] = float(self.policy.restarts)
        self.reporter.step(done, metrics if self.fleet is None else metrics | self.fleet.metrics())
        self.reporter.trace(done, output.samples, timer)
        self.reporter.mismatch(done, getattr(self.policy, "worst_tokens", ()))

    def save(self, done: int, evaluated: bool) -> None:
        """Write a checkpoint of this position, and an export if every save has one, unless it is
        there already.

        One that fails in the middle of a run is logged and counted, and the run goes on; the last
        one has to succeed.

        Raises:
            CheckpointError: the last save of the run failed.
        """
        self._carry_on(self.saving.finish)
        if self.policy is None or self.saved == (done, evaluated):
            return
        self.runner.run(self.collecting.hold(self.interrupt.requested))
        try:
            failures = self._write(done, evaluated)
        finally:
            self.collecting.go_on()
        for failure in failures:
            if self._is_last(done):
                raise failure
            self.reporter.failed_save(failure)

    def _write(self, done: int, evaluated: bool) -> list[CheckpointError]:
        """What could not be written."""
        failed: list[CheckpointError] = []
        # The export first: a kill in between leaves no checkpoint without its export.
        for write in (self._export_step, self._checkpoint):
            try:
                write(done, evaluated)
            except CheckpointError as error:
                failed.append(error)
        return failed

    def look_after_save(self) -> None:
        """Carry on with a checkpoint that is written while the run goes on."""
        self._carry_on(self.saving.look)

    def _carry_on(self, how: Callable[[], None]) -> None:
        try:
            how()
        except CheckpointError as error:
            self.reporter.failed_save(error)

    def _is_last(self, done: int) -> bool:
        return self.interrupt.requested or done >= self.schedule.num_steps

    def _export_step(self, done: int, evaluated: bool) -> None:
        if self._own_export(done) is not None:
            self._export(done)

    def _own_export(self, done: int) -> Path | None:
        """Where this step's export goes, if each step has one."""
        template = self.config.checkpoint.save_hf or ""
        return Path(template.format(rollout_id=done)) if "{rollout_id}" in template else None

    def _export(self, done: int) -> None:
        template = self.config.checkpoint.save_hf
        if template is None or self.policy is None:
            return
        path = Path(template.format(rollout_id=done))
        if path != self.exported:
            self.policy.export(path)
            self.exported = path

    def _checkpoint(self, done: int, evaluated: bool) -> None:
        assert self.policy is not None
        own, last = self.config, self._is_last(done)
        behind = own.checkpoint.async_save and own.runtime.mode != "local" and not last
        export = self.exported if self.exported == self._own_export(done) else None
        what = (done, evaluated), self._parts(evaluated, behind), export
        if behind:
            self.saving.begin(*what, self.policy)
        else:
            self.saving.save(*what)

    def _written(self, position: Position, path: Path, export: Path | None) -> None:
        self.saved, self.checkpoint = position, path
        self.reporter.saved(position[0], path)
        if self.after_save is not None:
            told = None if export is None else str(export)
            self.after_save(position[0] - 1, str(path), told)

    def _parts(self, evaluated: bool, behind: bool) -> dict[str, Part | WritingPart]:
        assert self.policy is not None
        parts: dict[str, Part | WritingPart] = {
            POLICY: self.policy.part(behind),
            "rng": capture_rng(),
            "loop": ({}, {"evaluated": evaluated, **self._origin()}),
        }
        if self.source is not None:
            with self.collecting.unused_put_back():
                if hasattr(self.source, "save"):
                    self.source.save(self.position[0] - 1)
                parts["source"] = ({}, self.source.state_dict())
        return parts

    def _origin(self) -> dict[str, Any]:
        """What a checkpoint needs beside its tensors to become a Hugging Face directory."""
        model = self.config.model
        return {
            "hf_checkpoint": str(Path(str(model.hf_checkpoint)).resolve()),
            "dtype": model.dtype,
            "trust_remote_code": model.trust_remote_code,
        }

    def finish(self, done: int) -> RunReport:
        """Export if asked for, and say how it ended.

        Raises:
            CheckpointError: what was still being written, or the export, failed.
        """
        self.saving.finish()
        ended_early = self.interrupt.requested and done < self.schedule.num_steps
        if not ended_early:
            self._export(done)
            if self.policy is not None:
                self.policy.export_critic()
        report = RunReport(
            run_dir=self.run_dir.path,
            steps_done=done,
            num_steps=self.schedule.num_steps,
            exit_code=self.interrupt.exit_code if ended_early else 0,
            metrics=self.reporter.last,
            exported=self.exported,
            engines=() if self.fleet is None else tuple(self.fleet.facts()),
        )
        self.reporter.finished(report)
        return report
