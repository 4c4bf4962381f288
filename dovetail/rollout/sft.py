"""A rollout function without an engine: takes samples that already have their response (SFT)."""

from __future__ import annotations

from dovetail.rollout.measure import shape_metrics
from dovetail.types import DataError, RolloutError, RolloutOutput, Sample
from dovetail.types.ports import DataSource


class SftRollout:
    """Takes `rollout_batch_size` groups per call from a source of supervised samples."""

    def __init__(self, source: DataSource, rollout_batch_size: int) -> None:
        self.source, self.rollout_batch_size = source, rollout_batch_size

    async def __call__(self, rollout_id: int) -> RolloutOutput:
        """The next groups, COMPLETED, with reward 0.0 where they have none.

        Raises:
            DataError: a sample has no response to learn from.
            RolloutError: the source gave no samples.
        """
        groups = self.source.get_samples(self.rollout_batch_size)
        samples = [sample for group in groups for sample in group]
        if not samples:
            raise RolloutError("the data source gave no samples (--prompt-data)")
        for sample in samples:
            _complete(sample)
        metrics = {f"rollout/{name}": value for name, value in shape_metrics(samples).items()}
        metrics["rollout/tokens"] = float(sum(sample.response_length for sample in samples))
        return RolloutOutput(groups, metrics)


def _complete(sample: Sample) -> None:
    if not sample.response_length:
        raise DataError(
            f"sample {sample.index} has no response to learn from; supervised training needs the "
            "column of the answer: --label-key (TOML: data.label_key)"
        )
    sample.status = Sample.Status.COMPLETED
    sample.reward = 0.0 if sample.reward is None else sample.reward
