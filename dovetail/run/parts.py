"""The living parts of one run, and what the loop asks of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.checkpoint.manager import CheckpointManager, Part
from dovetail.checkpoint.rng import capture_rng, restore_rng
from dovetail.config.run import RunConfig
from dovetail.observe.run_dir import RunDir, checkpoints_at
from dovetail.observe.trace import recording_run
from dovetail.run.interrupt import Interrupt
from dovetail.run.leaving import UserThreads, close_runner, wait_for
from dovetail.run.report import Reporter, RunReport, Timer, step_metrics
from dovetail.run.schedule import Schedule
from dovetail.run.serving import Served
from dovetail.runtime.fleet import Fleet
from dovetail.types import CheckpointError, EvalOutput, RolloutOutput, Sample
from dovetail.types.ports import DataSource, EngineControl
from dovetail.weights.publish import NamedTensors, publish

if TYPE_CHECKING:
    from dovetail.trainers.trainer import Trainer

log = logging.getLogger(__name__)

Collect = Callable[[int], Awaitable[RolloutOutput]]
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
    collect: Collect
    evaluator: Evaluate | None
    trainer: Trainer | None
    to_rows: Callable[[Sequence[Sample]], list[Any]]
    compute: ThreadPoolExecutor
    """The thread that trains and decodes."""
    source: DataSource | None = None
    scorer: ScorerPart | None = None
    teacher: Closing | None = None
    engines: list[Any] = field(default_factory=list)
    export: Callable[[Path], object] | None = None
    export_critic: Callable[[], object] = lambda: None
    log_rollout: LogRollout | None = None
    log_eval: LogEval | None = None
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
    position: tuple[int, bool] = (0, False)
    """Finished steps, and whether the evaluation due there is done: where a checkpoint would
    stand.
    """
    saved: tuple[int, bool] | None = None
    exported: Path | None = None
    """The last Hugging Face directory that was written."""
    _source_before: Any = None
    """The source's state before the rollout of the step under way."""
    _training: bool = False

    def __enter__(self) -> Run:
        self.interrupt.__enter__()
        self.runner.get_loop().set_default_executor(UserThreads())
        if self.router is not None and self.fleet is None:
            self.router.start(self.runner.get_loop())
        return self

    def start_engines(self) -> None:
        """Start the engines that have processes of their own, and the server before them.

        Raises:
            Interrupted: a signal came first; none of them is left.
        """
        if self.fleet is None:
            return
        starting = self.fleet.start(self.run_dir.engines, self.reporter.say)
        self.interrupt.run(self.runner, starting)
        if self.router is not None:
            self.router.serve_on(self.fleet.thread.loop)

    def __exit__(self, *exc: object) -> None:
        if isinstance(exc[1], Exception):
            # INFO keeps it off the terminal, where whoever catches it tells it.
            log.info("the run failed: %s", exc[1], exc_info=exc[1])
        try:
            if self.router is not None:
                self.router.close()
            self.runner.run(self._close())
        finally:
            close_runner(self.runner)
            self.reporter.close()
            self.interrupt.__exit__(*exc)

    async def _close(self) -> None:
        for part in (*self.engines, *([] if self.teacher is None else [self.teacher])):
            await part.close()
        if self.scorer is not None:
            self.scorer.close()
        # What it works on after an error is a user's function that may never return.
        self.compute.shutdown(wait=not self._training, cancel_futures=True)

    @property
    def between_steps(self) -> bool:
        """Whether the weights are no longer those of `position`."""
        return self._training and getattr(self.trainer, "changed", True)

    def stands_at(self, done: int, evaluated: bool) -> None:
        """So far everything is whole: a checkpoint could be taken here."""
        self.position, self._training, self._source_before = (done, evaluated), False, None

    def rewind(self) -> None:
        """Put the source back to where the step under way began."""
        if self.source is not None and self._source_before is not None:
            _restore(self.source, self._source_before)

    def resume(self) -> tuple[int, bool]:
        """Restore every part from `--load`; without it (0, False).

        A run that was killed before its first checkpoint has nothing to restore: when `--load` is
        the run's own directory of checkpoints and empty, it starts from the beginning.

        Returns:
            Finished steps, and whether the evaluation due there is done.

        Raises:
            CheckpointError: no good checkpoint, or one of another kind of run.
        """
        where = self.config.checkpoint.load
        if where is None:
            self.reporter.start(None)
            return self.position
        if self._is_own(Path(where)) and self.checkpoints.is_empty():
            log.warning("no checkpoint in %s yet: the run starts from the beginning", where)
            self.reporter.start(0, evaluated=False)
            return self.position
        checkpoint = self.checkpoints.load(Path(where))
        for reason in checkpoint.skipped:
            log.warning("passed over a damaged checkpoint: %s", reason)
        if self.trainer is not None:
            self.trainer.load_state_dict(*checkpoint.part("policy"))
        self.learn(start_rollout_id=checkpoint.step)
        if self.source is not None:
            if hasattr(self.source, "load"):
                self.source.load(checkpoint.step - 1)
            self.source.load_state_dict(checkpoint.part("source")[1])
        restore_rng(*checkpoint.part("rng"))
        evaluated = bool(checkpoint.part("loop")[1]["evaluated"])
        self.reporter.start(checkpoint.step, evaluated)
        self.saved = (checkpoint.step, evaluated)
        return self.saved

    def _is_own(self, where: Path) -> bool:
        return checkpoints_at(where).resolve() == self.checkpoints.directory.resolve()

    def publish(self, version: int) -> None:
        """Give the engines the weights after `version` steps."""
        controls = [engine for engine in self.engines if isinstance(engine, EngineControl)]
        if controls:
            self.runner.run(publish(controls, version, self.named_tensors))

    def rollout(self, rollout_id: int) -> RolloutOutput:
        """Collect the samples of one step; a signal meanwhile puts the source back where it was.

        Raises:
            Interrupted: a signal came before the step had its samples.
        """
        self._source_before = _snapshot(self.source)
        started = time.perf_counter()
        try:
            output = self.interrupt.run(self.runner, self._collect(rollout_id))
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

    async def _collect(self, rollout_id: int) -> RolloutOutput:
        with recording_run(self.config.observe.trace):
            return await self.collect(rollout_id)

    def train(self, output: RolloutOutput) -> dict[str, float]:
        """Train on one step's samples; nothing under --debug-rollout-only."""
        if self.trainer is None:
            return {}
        rows = self.to_rows([sample for group in output.samples for sample in group])
        self._training = True
        return wait_for(
            self.compute.submit(self.trainer.train, rows, self.position[0]), self.check_hooks
        )

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
        self.reporter.step(done, metrics if self.fleet is None else metrics | self.fleet.metrics())
        self.reporter.trace(done, output.samples, timer)
        self.reporter.mismatch(done, getattr(self.trainer, "worst_tokens", ()))

    def save(self, done: int, evaluated: bool) -> None:
        """Write a checkpoint of this position, and an export if every save has one, unless it is
        there already.

        One that fails in the middle of a run is logged and counted, and the run goes on; the last
        one has to succeed.

        Raises:
            CheckpointError: the last save of the run failed.
        """
        if self.trainer is None or self.saved == (done, evaluated):
            return
        failed: list[CheckpointError] = []
        # The export first: a kill in between leaves no checkpoint without its export.
        for write in (self._export_step, self._checkpoint):
            try:
                write(done, evaluated)
            except CheckpointError as error:
                failed.append(error)
        for failure in failed:
            if self.interrupt.requested or done >= self.schedule.num_steps:
                raise failure
            self.reporter.failed_save(failure)

    def _export_step(self, done: int, evaluated: bool) -> None:
        if "{rollout_id}" in (self.config.checkpoint.save_hf or ""):
            self._export(done)

    def _export(self, done: int) -> None:
        template = self.config.checkpoint.save_hf
        if template is None or self.export is None:
            return
        path = Path(template.format(rollout_id=done))
        if path != self.exported:
            self.export(path)
            self.exported = path

    def _checkpoint(self, done: int, evaluated: bool) -> None:
        path = self.checkpoints.save(done, self._parts(evaluated))
        self.saved = (done, evaluated)
        self.reporter.saved(done, path)

    def _parts(self, evaluated: bool) -> dict[str, Part]:
        assert self.trainer is not None
        parts: dict[str, Part] = {
            "policy": self.trainer.state_dict(),
            "rng": capture_rng(),
            "loop": ({}, {"evaluated": evaluated, **self._origin()}),
        }
        if self.source is not None:
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
        """Export if asked for, and say how it ended."""
        ended_early = self.interrupt.requested and done < self.schedule.num_steps
        if not ended_early:
            self._export(done)
            self.export_critic()
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


def _snapshot(source: Any) -> Any:
    """What `_restore` needs. A user's source may have a quicker way than its whole state."""
    if source is None:
        return None
    return source.snapshot() if hasattr(source, "snapshot") else source.state_dict()


def _restore(source: Any, before: Any) -> None:
    if hasattr(source, "restore"):
        source.restore(before)
    else:
        source.load_state_dict(before)
