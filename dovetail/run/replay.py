"""Samples of an earlier run in place of a rollout: `--load-debug-rollout-data`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from dovetail.observe.dump import read_samples
from dovetail.types import DataError, RolloutOutput, Sample


class Replay:
    """Gives the samples that `--save-debug-rollout-data` wrote, step by step."""

    def __init__(self, template: str) -> None:
        self.template = template

    def num_steps(self) -> int:
        """How many steps in a row, from step 0, were saved.

        Raises:
            DataError: not even the first was.
        """
        if "{rollout_id}" not in self.template:
            return 1
        count = 0
        while Path(self.template.format(rollout_id=count)).is_file():
            count += 1
        if not count:
            raise DataError(
                f"no saved samples at {self.template.format(rollout_id=0)} "
                "(--load-debug-rollout-data, TOML: debug.load_debug_rollout_data)"
            )
        return count

    async def __call__(self, rollout_id: int) -> RolloutOutput:
        """The groups of step `rollout_id`.

        Raises:
            DataError: the file is missing or malformed.
        """
        samples = read_samples(Path(self.template.format(rollout_id=rollout_id)))
        groups = [list(siblings) for _, siblings in groupby(samples, key=_group_of)]
        rewards = [s.reward for s in samples if isinstance(s.reward, int | float)]
        metrics = {"rollout/reward": sum(rewards) / len(rewards)} if rewards else {}
        return RolloutOutput(groups, metrics)


def _group_of(sample: Sample) -> object:
    # Samples without a group index stand alone: a group is never guessed from positions.
    return sample.group_index if sample.group_index is not None else id(sample)
