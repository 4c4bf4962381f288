"""Groups from their issue until the step that they belong to is trained: what a checkpoint puts
back to where prompts come from, so that nothing is lost and nothing trained twice."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from dovetail.data.source import fresh_copy
from dovetail.data.state import groups_to_json
from dovetail.observe.log import warn_once
from dovetail.rollout.flight import Landed
from dovetail.rollout.group import is_done
from dovetail.types import CheckpointError, Group, Sample

log = logging.getLogger(__name__)


@dataclass
class Issued:
    """One group."""

    prompts: Group
    """As the source gave it; may be written to while it is made."""
    version: int
    """Of the weights when it was started."""
    before: Group = field(init=False)
    """Copies of `prompts` as they were given."""
    landed: Landed | None = None
    """Its end, once it was made."""
    step: int | None = None
    """The step that keeps it, or that gave it up."""
    given_up: bool = False
    """It is not trained: refused, failed, or too old."""

    def __post_init__(self) -> None:
        self.before = [fresh_copy(sample) for sample in self.prompts]


class Pending:
    """All of them, by number.

    Args:
        whole_siblings: a sample whose status says that it is finished is: nobody writes to it any
            more although its group is not finished. So it is with the built-in generate function.
    """

    def __init__(self, whole_siblings: bool) -> None:
        self._whole_siblings = whole_siblings
        self._issued: dict[int, Issued] = {}

    def __getitem__(self, number: int) -> Issued:
        return self._issued[number]

    def issue(self, number: int, prompts: Group, version: int) -> None:
        """A group was started."""
        self._issued[number] = Issued(prompts, version)

    def give_up(self, number: int, step: int) -> None:
        """It will not be trained. It counts as gone when the step is trained whose metrics tell of
        it: a checkpoint before that has it still."""
        one = self._issued[number]
        one.step, one.given_up = step, True

    def take_out(self, number: int) -> Group:
        """It goes back to the source now; as the source gave it."""
        return self._issued.pop(number).before

    def settle(self, step: int) -> None:
        """The step was trained: what it took, and what it gave up, is gone."""
        gone = [n for n, one in self._issued.items() if one.step is not None and one.step <= step]
        for number in gone:
            del self._issued[number]

    def unused(self) -> list[Group]:
        """Copies of everything that is not gone, as a source takes it back: finished groups with
        what was made of them, others as they were given."""
        return [self._resumable(one) for _, one in sorted(self._issued.items())]

    def _resumable(self, one: Issued) -> Group:
        made = None if one.landed is None or one.given_up else one.landed.made
        if made is None and self._whole_siblings and not one.given_up:
            pairs = zip(one.prompts, one.before, strict=True)
            made = [sample if is_done(sample) else before for sample, before in pairs]
        if made is not None and len(made) == len(one.before) and _can_be_written(made):
            return [copy.deepcopy(sample) for sample in made]
        return [fresh_copy(sample) for sample in one.before]


def oldest_version(group: Iterable[Sample]) -> int | None:
    """The oldest weight version that a token of the group was sampled under; None: nobody says."""
    versions = [sample.oldest_weight_version for sample in group]
    return min((version for version in versions if version is not None), default=None)


def start_over(group: Group) -> Group:
    """The group with its responses thrown away."""
    for sample in group:
        if sample.response_length or is_done(sample):
            sample.reset_for_retry()
    return group


def _can_be_written(group: Group) -> bool:
    try:
        groups_to_json([group])
    except CheckpointError as error:
        warn_once(log, "finished groups are made again after a resume: %s", error)
        return False
    return True
