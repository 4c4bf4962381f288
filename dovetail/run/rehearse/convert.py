"""Conversions of a step's samples into training data."""

from __future__ import annotations

from dovetail.batch.convert import rows_from_samples
from dovetail.hooks import BoundHook
from dovetail.run.rehearse.samples import Unchanged, groups
from dovetail.run.rehearse.stage import Stage


def convert(hook: BoundHook, stage: Stage) -> None:
    """The samples of a small step become the rows that training takes."""
    made, stage.made_up = groups(stage.config, stage.missing, 2)
    samples = [sample for group in made for sample in group]
    before = Unchanged(samples)
    stage.call(
        lambda: rows_from_samples(
            samples,
            reward_key=stage.config.reward.reward_key,
            needs_reward=not stage.config.is_sft,
            convert=hook,
        )
    )
    before.check()
