"""A run that fails: what of it can still be saved, and where to go on from."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dovetail.hooks.limits import overdue
from dovetail.types import CheckpointError, HookRunError

if TYPE_CHECKING:
    from dovetail.run.parts import Run

log = logging.getLogger(__name__)


def save_what_stands(run: Run, error: Exception) -> None:
    """Save the position of a run that `error` ends, and note at the error where to go on from.

    Nothing is saved when the error came out of saving, when the weights are between two steps, or
    when nothing was done yet.
    """
    run.saving.settle()
    if run.policy is None or isinstance(error, CheckpointError):
        return
    done, evaluated = run.position
    begun = done > 0 or (evaluated and run.schedule.eval_due(0))
    if not run.between_steps and begun:
        run.rewind()
        _save(run)
    if run.saved is None:
        error.add_note("Nothing was saved: no step was finished before.")
        return
    lost = f"; step {done} is not in it" if run.saved[0] < done else ""
    error.add_note(
        f"The state after step {run.saved[0]} is saved{lost}. Go on from there with --load "
        f"{run.checkpoints.directory} (TOML: checkpoint.load)"
    )


def raise_if_overdue() -> None:
    """Give up waiting for a thread that stands in a user's function for ever.

    Raises:
        HookRunError: there is one; the message says where it stands.
    """
    message = overdue()
    if message is not None:
        raise HookRunError(message)


def _save(run: Run) -> None:
    try:
        run.save(*run.position)
    # The run ends with the error that came first; this one must not take its place.
    except Exception as failure:
        log.error("the state at the end could not be saved: %s", failure, exc_info=failure)
