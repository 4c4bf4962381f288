"""Which finished groups a step takes, and when it has enough: one pure state machine.

Synchronous rollout, over-sampling, dynamic sampling and partial rollout all count with it. It holds
no groups, no clock and no tasks: the caller tells it what happened, it answers what to do. Every
group that is issued leaves in exactly one way:

    issued = kept + dropped + failed + put_back + discarded + in_flight
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dovetail.types import DynamicFilterOutput, RolloutError


@dataclass
class Admission:
    """Counts the groups of one step.

    Example:
        >>> admission = Admission(target=2, submit_size=2)
        >>> admission.wanted()
        2
        >>> admission.issue(2)
        >>> admission.judge(DynamicFilterOutput(keep=True))
        True
        >>> admission.judge(DynamicFilterOutput(keep=False, reason="all_equal"))
        False
        >>> admission.wanted(), admission.enough
        (2, False)
    """

    target: int
    """Groups the step needs."""
    submit_size: int
    """Groups issued at a time."""
    max_dropped: int = 1000
    """So many groups dropped in a row end the run."""
    max_failed: int = 16
    """So many groups failed in a row end the run."""
    issued: int = 0
    kept: int = 0
    put_back: int = 0
    discarded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Groups that the filter refused, by reason."""
    failed: Counter[str] = field(default_factory=Counter)
    """Groups whose generation raised, by the exception's name."""
    dropped_in_a_row: int = 0
    failed_in_a_row: int = 0

    @property
    def in_flight(self) -> int:
        """Groups issued whose end is not known yet."""
        gone = self.kept + self.put_back + self.discarded
        return self.issued - gone - self.dropped.total() - self.failed.total()

    @property
    def enough(self) -> bool:
        """True: abort what is left, and settle it with `take_back` or `discard`."""
        return self.kept >= self.target

    def wanted(self) -> int:
        """Groups to issue now: whole submissions until kept plus in flight reach the target."""
        missing = 0 if self.enough else self.target - self.kept - self.in_flight
        return -(-missing // self.submit_size) * self.submit_size if missing > 0 else 0

    def issue(self, num_groups: int) -> None:
        """So many groups were taken from the source and started."""
        self.issued += num_groups

    def judge(self, output: DynamicFilterOutput) -> bool:
        """A group finished while the step was not full, and the filter said `output`. True: keep.

        A refused group with `keep_when_insufficient` is kept when refusing it would force another
        submission.

        Raises:
            RolloutError: `max_dropped` groups in a row were dropped.
        """
        self.failed_in_a_row = 0
        assert not self.enough, "a full step judges nothing: take back or discard"
        short_without_it = self.kept + self.in_flight <= self.target
        if output.keep or (output.keep_when_insufficient and short_without_it):
            self.kept += 1
            self.dropped_in_a_row = 0
            return True
        self.drop(output.reason or "unnamed")
        return False

    def drop(self, reason: str) -> None:
        """A group leaves because of what is in it.

        Raises:
            RolloutError: `max_dropped` groups in a row were dropped.
        """
        self.dropped[reason] += 1
        self.dropped_in_a_row += 1
        if self.dropped_in_a_row >= self.max_dropped:
            raise RolloutError(
                f"{self.dropped_in_a_row} groups in a row were dropped ({_listed(self.dropped)}); "
                f"the step has {self.kept} of {self.target}. Look at the filter "
                "(--dynamic-sampling-filter-path, TOML: hooks.dynamic_sampling_filter_path) and at "
                "the rewards, or allow more with --max-dropped-groups (TOML "
                f"rollout.max_dropped_groups, now {self.max_dropped})"
            )

    def fail(self, error: BaseException) -> None:
        """A group leaves because generating it raised.

        Raises:
            RolloutError: `max_failed` groups in a row failed.
        """
        self.failed[type(error).__name__] += 1
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.max_failed:
            raise RolloutError(
                f"{self.failed_in_a_row} groups in a row failed ({_listed(self.failed)}); the last "
                f"with {type(error).__name__}: {error}. Look at the generate function "
                "(--custom-generate-function-path, TOML: hooks.custom_generate_function_path), or "
                "allow more with --max-failed-groups (TOML: rollout.max_failed_groups, now "
                f"{self.max_failed})"
            ) from error

    def take_back(self) -> None:
        """A group that the step does not need went back to the source."""
        self.put_back += 1

    def discard(self) -> None:
        """A group that the step does not need was thrown away."""
        self.discarded += 1


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common())
