"""Conversions of a step's samples into training data."""

from __future__ import annotations

import difflib
from typing import Any

from dovetail.batch.convert import OF_ROW, OPTIONAL, rows_from_samples
from dovetail.hooks import BoundHook
from dovetail.run.rehearse.samples import Unchanged, groups
from dovetail.run.rehearse.stage import Stage
from dovetail.types import Sample

_NEARLY = 0.88
"""Likeness of `loss_mask` and `loss_masks`, and above that of names that are other words."""


def convert(hook: BoundHook, stage: Stage) -> None:
    """The samples of a small step become the rows that training takes."""
    made, stage.made_up = groups(stage.config, stage.missing, 2)
    samples = [sample for group in made for sample in group]
    before = Unchanged(samples)
    names: set[str] = set()

    def noted(given: list[Sample]) -> Any:
        data = hook(given)
        names.update(data)
        return data

    stage.call(
        lambda: rows_from_samples(
            samples,
            reward_key=stage.config.reward.reward_key,
            needs_reward=not stage.config.is_sft,
            convert=noted,
        )
    )
    before.check()
    warn_of_misspelt(stage, names, {*OF_ROW, *OPTIONAL} - names)


def warn_of_misspelt(stage: Stage, given: set[str], known: set[str]) -> None:
    """Warn of columns that only hooks read and whose names are nearly those of known ones."""
    for name in sorted(given - {*OF_ROW, *OPTIONAL}):
        for meant in difflib.get_close_matches(name, sorted(known), n=1, cutoff=_NEARLY):
            stage.warn(f"sets {name!r}, which only your own functions read; did you mean {meant}?")
