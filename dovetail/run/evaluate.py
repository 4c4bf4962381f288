"""Evaluation alone: the sets of a configuration, answered once by a model or a checkpoint of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

from dovetail.checkpoint.manager import load_checkpoint
from dovetail.config.check import check_evaluation
from dovetail.config.eval_sets import eval_sets
from dovetail.config.resolve import Resolved
from dovetail.config.run import RunConfig
from dovetail.observe.atomic import write_atomic
from dovetail.observe.eval_table import eval_facts
from dovetail.observe.log import open_log
from dovetail.observe.run_dir import RunDir
from dovetail.observe.trace import recording_run
from dovetail.observe.tracker import check_trackers
from dovetail.run.build import Parts
from dovetail.run.engines import weights_of
from dovetail.run.interrupt import Interrupt, Interrupted
from dovetail.run.leaving import users_runner
from dovetail.run.rehearse.plan import IN_EVALUATION, rehearse_hooks
from dovetail.run.report import Reporter, RunReport, Timer, tracker_names
from dovetail.run.restored import restore_policy, untrained
from dovetail.run.rollouts import make_evaluator
from dovetail.run.validate import validate_names
from dovetail.runtime.starting import Say
from dovetail.types import EvalOutput
from dovetail.weights.publish import publish

log = logging.getLogger(__name__)


def run_eval(resolved: Resolved) -> RunReport:
    """Evaluate `hf_checkpoint`, or with `load` a checkpoint trained from it, and log the results:
    metrics and samples in a run directory, and `evaluation.json` there. The report's metrics are
    the evaluation's, whatever the user's log function made of them.

    Raises:
        DovetailError: the configuration, a hook, the data, the model or the checkpoint is at fault.
    """
    resolved = _in_one_process(resolved)
    config = resolved.config
    check_evaluation(config)
    validate_names(config)
    parts = _loaded(resolved)
    check_trackers(tracker_names(config.observe))
    step = _restored(parts)
    run_dir = RunDir.create(f"{config.observe.run_name}-eval", config.observe.run_dir)
    reporter = Reporter(resolved, run_dir, num_steps=None)
    reporter.start(None)
    evaluator, timer = make_evaluator(parts, reporter), Timer()
    assert evaluator is not None
    log_eval = parts.hooks.get("custom_eval_rollout_log_function")
    with users_runner() as runner, Interrupt() as interrupt:

        async def work() -> EvalOutput:
            await _publish(parts, step, run_dir, reporter.say)
            with recording_run(config.observe.trace):
                return await evaluator(step)

        async def close() -> None:
            await parts.engine.close()

        try:
            if parts.router is not None and parts.fleet is None:
                parts.router.start(runner.get_loop())
            with timer.phase("eval"):
                output = interrupt.run(runner, work())
            found = _numbers(output)
            if log_eval is not None and log_eval(step, output.columns, output.metrics):
                output.metrics = {}
            reporter.evaluation(step, output, timer)
            _write(run_dir, config, step, found)
            reporter.tell_where()
        except Interrupted:
            return RunReport(run_dir.path, 0, 0, exit_code=interrupt.exit_code)
        except Exception as error:
            log.info("the evaluation failed: %s", error, exc_info=error)
            raise
        finally:
            if parts.router is not None:
                parts.router.close()
            runner.run(close())
            parts.scorer.close()
            parts.compute.shutdown()
            reporter.close()
    return RunReport(run_dir.path, 0, 0, metrics=found)


def _in_one_process(resolved: Resolved) -> Resolved:
    """Nothing is trained, so there is nothing for a cluster to do: engines are started here."""
    runtime = resolved.config.runtime.model_copy(update={"mode": "local"})
    config = resolved.config.model_copy(update={"runtime": runtime})
    return dataclasses.replace(resolved, config=config)


async def _publish(parts: Parts, step: int, run_dir: RunDir, say: Say) -> None:
    """Give the engine the weights, and start it first where it is not in this process."""
    fleet = parts.fleet
    if fleet is None:
        await parts.engine.receive_weights(step, None)
        return
    await fleet.start(run_dir.engines, say)
    if parts.router is not None:
        parts.router.serve_on(fleet.thread.loop)
    await publish([fleet.engine], step, weights_of(parts.models))


def _loaded(resolved: Resolved) -> Parts:
    with open_log(None):
        rehearse_hooks(resolved, IN_EVALUATION)
        parts = Parts(untrained(resolved))
        parts.check_lengths(training=False)
        _ = parts.eval_sets, parts.scorer, parts.models.model
    return parts


def _restored(parts: Parts) -> int:
    """Steps behind the weights, which are those of `load` if that is set."""
    load = parts.config.checkpoint.load
    if load is None:
        return 0
    checkpoint = load_checkpoint(load)
    restore_policy(parts.models.model, checkpoint)
    return checkpoint.step


def _numbers(output: EvalOutput) -> dict[str, float]:
    """The metrics that are finite numbers: a user's function may put anything in."""
    return {
        name: float(value)
        for name, value in output.metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _write(run_dir: RunDir, config: RunConfig, step: int, metrics: dict[str, float]) -> None:
    """What was evaluated, and what came of it; nothing that depends on the clock."""
    facts = {
        "model": config.model.hf_checkpoint,
        "checkpoint": config.checkpoint.load,
        "step": step,
        "seed": config.data.rollout_seed,
        "data": {one.name: one.path for one in eval_sets(config)},
        "sets": eval_facts(metrics),
    }
    write_atomic(run_dir.evaluation, (json.dumps(facts, indent=2) + "\n").encode())
