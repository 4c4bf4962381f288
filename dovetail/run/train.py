"""The loop.

    source --groups--> rollout --samples--> rewards --> rows --> advantages -> loss -> optimizer
      ^                   |                                                            |
      +---- put back -----+ <------------------ publish(version) <---------------------+

One turn is one step: collect samples with the current weights, train on them, publish the new
weights.
Rollout and evaluation run on the asyncio loop and wait for engines and rewards; training blocks
it, and with max_lag above 0 lets it turn: samples of later steps are made meanwhile. A signal
cancels a rollout (its prompts go back) but never a training step, so what is saved is always a
whole number of steps. An error ends the run at the same places: where the weights are those of a
whole number of steps, they are saved first.
"""

from __future__ import annotations

from dovetail.config.resolve import Resolved
from dovetail.run.build import build
from dovetail.run.faults import save_what_stands
from dovetail.run.heap import settled_heap
from dovetail.run.interrupt import Interrupted
from dovetail.run.parts import Run
from dovetail.run.report import RunReport, Timer
from dovetail.run.resuming import recover, resume
from dovetail.types import TrainerLostError


def run_training(resolved: Resolved) -> RunReport:
    """Build the parts of a resolved configuration and train to the end, or to a signal.

    Raises:
        DovetailError: see the subclasses; a note says what was saved and where to go on from.
    """
    with build(resolved) as run:
        done, evaluated = resume(run)
        try:
            with settled_heap():
                done, evaluated = train_on(run, done, evaluated)
        except Interrupted:
            done, evaluated = run.position
            run.save(done, evaluated)
        except Exception as error:
            save_what_stands(run, error)
            raise
        return run.finish(done)


def train_on(run: Run, done: int, evaluated: bool) -> tuple[int, bool]:
    """`train`; when processes of the trainer are lost, again from the last checkpoint."""
    while True:
        try:
            return train(run, done, evaluated)
        except TrainerLostError as error:
            done, evaluated = recover(run, error)


def train(run: Run, done: int, evaluated: bool) -> tuple[int, bool]:
    """Turn the loop from `done` finished steps to the last one, or until a signal asks to leave.

    Returns:
        Finished steps, and whether the evaluation due at that point is done.

    Raises:
        Interrupted: a signal cancelled a rollout or an evaluation; `run.position` is where it
        stood.
    """
    run.stands_at(done, evaluated)
    run.start_engines()
    run.publish(done, always=True)
    if not evaluated:
        evaluate(run, done)
    while done < run.schedule.num_steps and not run.interrupt.requested:
        timer = Timer()
        with timer.phase("rollout"):
            output = run.rollout(done)
        with timer.phase("train"):
            trained = run.train(output)
        done += 1
        with timer.phase("publish"):
            run.publish(done)
        run.stands_at(done, not run.schedule.eval_due(done))
        run.report_step(done, output, trained, timer)
        if not run.interrupt.requested:
            evaluate(run, done)
        run.look_after_save()
        if run.schedule.save_due(done) or run.interrupt.requested:
            run.save(*run.position)
    return run.position


def evaluate(run: Run, done: int) -> None:
    """Evaluate if it is due when `done` steps are done."""
    if run.schedule.eval_due(done):
        run.evaluate(done)
    run.stands_at(done, True)
