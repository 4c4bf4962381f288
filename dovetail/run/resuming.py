"""Going on from a checkpoint: at the start of a run, and when its trainer lost processes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.checkpoint.rng import capture_rng, restore_rng
from dovetail.observe.run_dir import checkpoints_at
from dovetail.run.collecting import restore_to, snapshot_of
from dovetail.types import TrainerLostError

if TYPE_CHECKING:
    from dovetail.run.parts import Run

log = logging.getLogger(__name__)


def resume(run: Run) -> tuple[int, bool]:
    """Start the trainer, and restore every part from `--load`; without it (0, False).

    A run that was killed before its first checkpoint has nothing to restore: when `--load` is
    the run's own directory of checkpoints and empty, it starts from the beginning.

    Returns:
        Finished steps, and whether the evaluation due there is done.

    Raises:
        CheckpointError: no good checkpoint, or one of another kind of run.
    """
    where = run.config.checkpoint.load
    has_none = where is not None and _is_own(run, Path(where)) and run.checkpoints.is_empty()
    if where is not None and not has_none:
        run.start_policy()
        return _restored(run, Path(where), run.reporter.start)
    if has_none:
        log.warning("no checkpoint in %s yet: the run starts from the beginning", where)
    run.beginning = (snapshot_of(run.source), capture_rng())
    run.reporter.start(0 if has_none else None, evaluated=False)
    run.start_policy()
    return run.position


def recover(run: Run, error: TrainerLostError) -> tuple[int, bool]:
    """Start a lost trainer anew and go back to the last checkpoint, or to the beginning; the
    engines stay. As often as `max_trainer_restarts` allows.

    Returns:
        As `resume`.

    Raises:
        TrainerLostError: it was lost too often.
    """
    assert run.policy is not None
    most = run.config.runtime.max_trainer_restarts
    run.runner.run(run.collecting.close())
    run.saving.settle()
    run.exported = None
    while run.policy.restarts < most:
        step = 0 if run.saved is None else run.saved[0]
        number = run.policy.restarts + 1
        log.warning("%s; it is started anew (%d of %d) after step %d", error, number, most, step)
        try:
            run.policy.restart()
            if run.checkpoint is not None:
                return _restored(run, run.checkpoint, run.reporter.rewound)
            return _begun_again(run)
        except TrainerLostError as again:
            error = again
    error.add_note(
        f"It was started anew {run.policy.restarts} times, no more are allowed: "
        "--max-trainer-restarts (TOML: runtime.max_trainer_restarts)"
    )
    raise error


def _begun_again(run: Run) -> tuple[int, bool]:
    assert run.beginning is not None, "a run without a checkpoint has begun here"
    source, generators = run.beginning
    if run.source is not None:
        restore_to(run.source, source)
    restore_rng(*generators)
    run.reporter.rewound(0, False)
    return (0, False)


def _restored(run: Run, where: Path, start: Callable[[int, bool], object]) -> tuple[int, bool]:
    checkpoint = run.checkpoints.load(where)
    for reason in checkpoint.skipped:
        log.warning("passed over a damaged checkpoint: %s", reason)
    if run.policy is not None:
        run.policy.load(checkpoint)
    run.learn(start_rollout_id=checkpoint.step)
    if run.source is not None:
        if hasattr(run.source, "load"):
            run.source.load(checkpoint.step - 1)
        run.source.load_state_dict(checkpoint.part("source")[1])
    restore_rng(*checkpoint.part("rng"))
    evaluated = bool(checkpoint.part("loop")[1]["evaluated"])
    start(checkpoint.step, evaluated)
    run.saved, run.checkpoint = (checkpoint.step, evaluated), checkpoint.path
    return run.saved


def _is_own(run: Run, where: Path) -> bool:
    return checkpoints_at(where).resolve() == run.checkpoints.directory.resolve()
