"""`rollout.filter_hub.base_types`: what dynamic sampling filters give back, and who counts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dovetail.types import DynamicFilterOutput, Sample

FilterOutput = DynamicFilterOutput


def call_dynamic_filter(
    fn: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> DynamicFilterOutput:
    """The verdict of `fn`; without a function every group is kept, any other value is a truth."""
    given = True if fn is None else fn(*args, **kwargs)
    if isinstance(given, DynamicFilterOutput):
        return given
    return DynamicFilterOutput(keep=given)


def should_drop_dynamic_filter_output(
    output: DynamicFilterOutput, *, remaining_batch_size: int, target_data_size: int
) -> bool:
    """Whether a group goes: a refused one that may fill a gap stays when there is no surplus."""
    if output.keep:
        return False
    no_surplus = remaining_batch_size <= target_data_size
    return not (output.keep_when_insufficient and no_surplus)


def iter_samples(group: list[Any]) -> Iterator[Sample]:
    """The samples of a group, also of one whose members fanned out."""
    for member in group:
        if isinstance(member, list):
            yield from member
        else:
            yield member


class MetricGatherer:
    """Counts the groups that filters dropped, by their reason."""

    def __init__(self) -> None:
        self._dropped: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        """A group was dropped; without a reason it is not counted."""
        if reason:
            self._dropped[reason] += 1

    def collect(self) -> dict[str, int]:
        """`rollout/dynamic_filter/drop_<reason>`: how many."""
        return {f"rollout/dynamic_filter/drop_{why}": n for why, n in self._dropped.items()}


__all__ = [
    "DynamicFilterOutput",
    "FilterOutput",
    "MetricGatherer",
    "call_dynamic_filter",
    "iter_samples",
    "should_drop_dynamic_filter_output",
]
