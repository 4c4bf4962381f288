"""Which weights a group may be trained with, and when groups are started: one pure state machine.

With `max_lag` n, groups for step k may be started once version k - n is published, and a group is
trained in step k if k - (the oldest version of its tokens) <= n. It holds no groups, no clock and
no tasks: the caller tells it what happened, it answers what to do. Every group that is issued
leaves in exactly one way:

    issued = trained + dropped + put_back + pending
    pending = in_flight + waiting + gathered (kept by a step that is not trained yet)

    publish --> wanted --issue--> in flight --finish--> waiting --next--> keep --trained--> out
                                     |                     |
                                     +---- overdue --------+--> put back, or drop

A group that finished is trained as late as its bound allows, so that those with the oldest tokens
go first; a step leaves room for groups in flight that no later step could take, and waits for
them. So nothing is lost to the bound but what over-sampling has made too much of.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


class _Ages:
    """Groups with the oldest version of their tokens. A step of thousands asks after every one
    that lands, so nothing here looks at all of them."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}
        self.versions: Counter[int] = Counter()
        """Version -> groups of which it is the oldest."""
        self._by_age: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, group: int) -> int:
        return self._of[group]

    def put(self, group: int, oldest: int) -> None:
        self._of[group] = oldest
        self.versions[oldest] += 1
        heapq.heappush(self._by_age, (oldest, group))

    def take(self, group: int) -> int | None:
        """Its version; None: it is not here."""
        oldest = self._of.pop(group, None)
        if oldest is not None:
            self.versions[oldest] -= 1
            if not self.versions[oldest]:
                del self.versions[oldest]
        return oldest

    def first(self, is_stale: Callable[[int], bool]) -> tuple[int, int] | None:
        """(version, group) that comes first of those that are not stale, which nothing that is
        stale becomes again."""
        heap = self._by_age
        while heap and (self._of.get(heap[0][1]) != heap[0][0] or is_stale(heap[0][0])):
            heapq.heappop(heap)
        return heap[0] if heap else None

    def where(self, is_stale: Callable[[int], bool]) -> list[int]:
        """The stale ones, in the order in which they came."""
        if not any(map(is_stale, self.versions)):
            return []
        return [group for group, oldest in self._of.items() if is_stale(oldest)]


@dataclass
class LagWindow:
    """Counts the groups of all steps that are open.

    Example:
        >>> window = LagWindow(target=2, max_lag=1)
        >>> window.publish(0)
        >>> window.wanted()  # Two steps may be collected under version 0: 0 and 1.
        4
        >>> for group in range(4):
        ...     window.issue(group)
        >>> window.finish(2)
        >>> window.next()
        2
        >>> window.keep(2), window.full
        (None, False)
    """

    target: int
    """Groups of a step."""
    max_lag: int
    submit_size: int = 1
    """Groups are issued in multiples of it."""
    max_open: int | None = None
    """Steps at most that have groups and are not in training; None: max_lag + 1."""
    max_in_flight: int | None = None
    """Groups at most that are made at once; None: no limit."""
    keeps_stale: bool = False
    """Train also what is older than the bound."""
    num_steps: int | None = None
    """Steps of the whole run: no group is issued for later ones."""
    step: int = 0
    """The step that is filled now."""
    version: int = -1
    """Of the weights that were published last; -1: none yet."""
    num_trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    put_back: int = 0
    issued: int = 0
    _in_flight: _Ages = field(default_factory=_Ages)
    """By the oldest version that a token of them has or may get; in order of issue."""
    _waiting: _Ages = field(default_factory=_Ages)
    _kept: list[int] = field(default_factory=list)
    _gathered: dict[int, list[int]] = field(default_factory=dict)
    """Step -> its groups, until it is trained."""

    @property
    def in_flight(self) -> int:
        """Groups that are being made."""
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Groups that are made and that no step has yet."""
        return len(self._waiting)

    @property
    def pending(self) -> int:
        """Groups that are issued and whose end is not known."""
        gathered = sum(map(len, self._gathered.values()))
        return len(self._in_flight) + len(self._waiting) + len(self._kept) + gathered

    @property
    def full(self) -> bool:
        """Whether the step has its groups: `close_step` goes on to the next one."""
        return len(self._kept) >= self.target

    @property
    def last_open(self) -> int:
        """The last step that groups may be issued for."""
        last = self.version + self.max_lag if self.version >= 0 else -1
        if self.max_open is not None:
            # Of the steps that were filled one is in training.
            waiting = max(0, len(self._gathered) - 1)
            last = min(last, self.step + self.max_open - waiting - 1)
        return last if self.num_steps is None else min(last, self.num_steps - 1)

    def may_begin(self, step: int) -> bool:
        """Whether a step may be collected: the weights that its lag allows are published."""
        return step <= self.last_open

    def wanted(self) -> int:
        """Groups to issue now."""
        missing = (self.last_open + 1 - self.step) * self.target
        missing -= len(self._kept) + len(self._waiting) + len(self._in_flight)
        if missing <= 0:
            return 0
        wanted = -(-missing // self.submit_size) * self.submit_size
        if self.max_in_flight is not None:
            wanted = min(wanted, self.max_in_flight - len(self._in_flight))
        return max(0, wanted)

    def publish(self, version: int) -> None:
        """From now on tokens are made under these weights."""
        assert version >= self.version, "versions only grow"
        self.version = version

    def issue(self, group: int, oldest: int | None = None) -> None:
        """A group was started.

        Args:
            group: a number that was never issued.
            oldest: the oldest version of tokens that it brings along (resumed); None: it has none.
        """
        assert self.version >= 0, "nothing is made before the first weights"
        self.issued += 1
        oldest = self.version if oldest is None else min(oldest, self.version)
        self._in_flight.put(group, oldest)

    def finish(self, group: int, oldest: int | None = None) -> None:
        """A group was made; `oldest` is the oldest version of its tokens, None: not known."""
        born = self._in_flight.take(group)
        assert born is not None, "what finishes was in flight"
        self._waiting.put(group, born if oldest is None else oldest)

    def again(self, group: int, oldest: int | None = None) -> None:
        """A group that came back unfinished, and is in flight once more with the tokens it has."""
        born = self._in_flight.take(group)
        assert born is not None, "what comes back was in flight"
        self._in_flight.put(group, born if oldest is None else min(oldest, self.version))

    def oldest(self, group: int) -> int:
        """Of the tokens of a group that waits."""
        return self._waiting[group]

    def lag(self, oldest: int) -> int:
        """Of a group in the step that is filled now."""
        return max(0, self.step - oldest)

    def is_stale(self, oldest: int) -> bool:
        """Whether no step from now on can train tokens of that version."""
        return not self.keeps_stale and self.lag(oldest) > self.max_lag

    def next(self) -> int | None:
        """The waiting group that the step shall look at next: `keep` it, or let it go. None: wait
        for another to finish. Those of `overdue` are passed over."""
        # Over-sampling may leave groups for a step that may not begin yet.
        too_early = self.step > self.version + self.max_lag
        first = None if self.full or too_early else self._waiting.first(self.is_stale)
        if first is None:
            return None
        oldest, group = first
        if self.keeps_stale or self._is_due(oldest):
            return group
        flying = self._in_flight.versions.items()
        due = sum(count for version, count in flying if self._is_due(version))
        return group if self.target - len(self._kept) - due > 0 else None

    def overdue(self) -> list[int]:
        """Groups, made or in flight, that no step can train any more: end them, and let each go
        with `take_back` or `drop`."""
        return [*self._in_flight.where(self.is_stale), *self._waiting.where(self.is_stale)]

    def keep(self, group: int) -> None:
        """The step trains this group."""
        assert not self.full, "the step is full"
        assert not self.is_stale(self._waiting[group]), "the bound is never exceeded"
        self._waiting.take(group)
        self._kept.append(group)

    def drop(self, group: int, reason: str) -> None:
        """A group is never trained: a filter refused it, making it failed, or it is too old."""
        self._let_go(group)
        self.dropped[reason] += 1

    def take_back(self, group: int) -> None:
        """A group went back to where prompts come from, to be issued again."""
        self._let_go(group)
        self.put_back += 1

    def close_step(self) -> list[int]:
        """The groups of the step; the next one is filled from now on."""
        assert self.full, "a step is closed when it is full"
        groups, self._kept = self._kept, []
        self._gathered[self.step] = groups
        self.step += 1
        return groups

    def trained(self, step: int) -> list[int]:
        """A step was trained; its groups are out."""
        groups = self._gathered.pop(step)
        self.num_trained += len(groups)
        return groups

    def _is_due(self, oldest: int) -> bool:
        return not self.keeps_stale and self.lag(oldest) >= self.max_lag

    def _let_go(self, group: int) -> None:
        if self._in_flight.take(group) is None:
            gone = self._waiting.take(group)
            assert gone is not None, "only what is issued is let go"
