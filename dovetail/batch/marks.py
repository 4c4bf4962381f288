"""What a function of the training side did to samples, on the rows that were made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dovetail.batch.convert import bits, hook_fault, listed
from dovetail.batch.rows import TrainRow
from dovetail.types.errors import TrainError
from dovetail.types.sample import Sample

Marks = tuple[Any, ...]


def sample_marks(sample: Sample | None) -> Marks:
    """What a function may change on a sample with an effect, as it is now."""
    if sample is None:
        return ()
    mask = None if sample.loss_mask is None else listed(sample.loss_mask)
    return sample.remove_sample, mask, sample.metadata, sample.train_metadata


def remarked_rows(slot: str, rows: Sequence[TrainRow], before: Sequence[Marks]) -> list[TrainRow]:
    """The rows with what was changed on their samples since `before`.

    Raises:
        HookRunError: a sample's loss mask is no list of 0 and 1, or does not fit its response.
    """
    return [_remarked(slot, row, was) for row, was in zip(rows, before, strict=True)]


def _remarked(slot: str, row: TrainRow, was: Marks) -> TrainRow:
    sample = row.sample
    if sample is None:
        return row
    removed, mask, metadata, train_metadata = was
    changed: dict[str, Any] = {}
    try:
        now = sample_marks(sample)
        if now == was:
            return row
        if sample.remove_sample and not removed:
            changed["loss_mask"] = [0] * row.response_length
        elif now[1] != mask and now[1] is not None:
            changed["loss_mask"] = bits(now[1])
        if row.metadata is metadata:
            changed["metadata"] = sample.metadata
        if row.train_metadata is train_metadata:
            changed["train_metadata"] = sample.train_metadata
        return dataclasses.replace(row, **changed)
    except TrainError as error:
        raise hook_fault(slot, str(error)) from error
    except (TypeError, ValueError):
        raise hook_fault(
            slot,
            f"sample {row.index}: loss_mask is {sample.loss_mask!r:.60}, expected a list of "
            f"{row.response_length} entries, the response_length, each 0 or 1",
        ) from None
