"""The loop of a run on a clock of events: what is admitted, kept, aborted and put back is decided
by the run's own `rollout.admit.Admission` and `rollout.lag.LagWindow`; only time is made up.

    max_lag 0   collect -> train -> publish -> collect, as `rollout/rollout.py`
    max_lag n   collect goes on while the trainer trains, as `rollout/stream.py`
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence as Listed
from dataclasses import dataclass

from benchmarks.simulated_engines import Clock, Engines, Sequence
from benchmarks.simulated_work import Machine, Outcome, Work
from dovetail.rollout.admit import Admission
from dovetail.rollout.lag import LagWindow
from dovetail.types import DynamicFilterOutput

_KEEP = DynamicFilterOutput(keep=True)
_REFUSE = DynamicFilterOutput(keep=False, reason="filter")


@dataclass(eq=False, slots=True)
class _Group:
    number: int
    sequences: list[Sequence]
    lengths: list[int]
    born: int
    """Version of its oldest token."""
    refused: bool
    open: int


def simulate(machine: Machine, work: Work) -> Outcome:
    """Run `work.steps` steps. The same arguments give the same outcome, to the bit.

    Raises:
        ValueError: a lag on devices that are shared in turns.
    """
    if work.max_lag and machine.turns:
        raise ValueError("with a lag engines and trainer work at once: they can't share devices")
    made = _Ahead(machine, work) if work.max_lag else _InTurn(machine, work)
    return made.run()


class _Loop:
    """What both ways share: groups, the trainer's time, counting."""

    def __init__(self, machine: Machine, work: Work) -> None:
        self.machine, self.work = machine, work
        self.clock = Clock()
        self.engines = Engines(self.clock, machine.engines, machine.engine, self._sequence_done)
        self.out = Outcome(machine, warm_up=work.warm_up)
        self.groups: dict[int, _Group] = {}
        """Those under way, or finished and not trained."""
        self.buffer: deque[_Group] = deque()
        """Put back, to be issued first."""
        self.version = 0
        self._drawn = self._numbered = 0

    def run(self) -> Outcome:
        """To the end."""
        self._start()
        while len(self.out.step_ends) < self.work.steps:
            if not self.clock.turn():
                raise AssertionError("nothing is under way and the run is not over")
        self.out.engine_busy_s = self.engines.busy_s
        self.out.made_tokens = self.engines.made_tokens
        self.out.pending = self._pending()
        return self.out

    def _start(self) -> None:
        raise NotImplementedError

    def _group_done(self, group: _Group) -> None:
        raise NotImplementedError

    def _published(self) -> None:
        raise NotImplementedError

    def _pending(self) -> int:
        raise NotImplementedError

    def issue(self) -> _Group:
        """A group that was put back, or a new one; numbered anew, as the window wants it."""
        group = self.buffer.popleft() if self.buffer else self._draw()
        group.number, self._numbered = self._numbered, self._numbered + 1
        self.groups[group.number] = group
        self.out.issued += 1
        fresh = [
            Sequence(group.number, one.tokens, gone=one.tokens == 0) for one in group.sequences
        ]
        group.sequences = fresh
        group.open = sum(not one.gone for one in fresh)
        return group

    def launch(self, groups: list[_Group]) -> None:
        """Their sequences to the engines."""
        self.engines.submit([s for group in groups for s in group.sequences if not s.gone])

    def train(self, step: int, groups: list[_Group]) -> None:
        """The trainer works on a step from now on, then publishes."""
        own = self.machine
        tokens = [length + self.work.prompt_tokens for g in groups for length in g.lengths]
        shares = shared_out(tokens, own.trainer_groups)
        seconds = max(shares) * own.train_token_s + own.train_fixed_s
        self.out.trainer_busy_s += sum(shares) * own.train_token_s
        self.out.trainer_busy_s += own.train_fixed_s * own.trainer_groups
        self.out.trained += len(groups)
        self.out.trained_tokens += sum(length for group in groups for length in group.lengths)
        self.out.lags += [step - group.born for group in groups]
        self.clock.at(self.clock.now + own.switch_s + seconds, self._publish)

    def _publish(self) -> None:
        self.engines.pause(self.machine.publish_s)
        self.clock.at(self.clock.now + self.machine.publish_s, self._step_over)

    def _step_over(self) -> None:
        self.version += 1
        self.out.step_ends.append(self.clock.now)
        if len(self.out.step_ends) < self.work.steps:
            self._published()

    def _draw(self) -> _Group:
        number, self._drawn = self._drawn, self._drawn + 1
        rng = random.Random(f"{self.work.seed}/{number}")
        lengths = self.work.lengths.group(rng, self.work.samples)
        refused = rng.random() < self.work.refused
        return _Group(
            -1, [Sequence(-1, n) for n in lengths], lengths, self.version, refused, len(lengths)
        )

    def _sequence_done(self, sequence: Sequence) -> None:
        group = self.groups.get(sequence.group)
        if group is None:
            return
        group.open -= 1
        if group.open:
            return
        if self.work.reward_s:
            self.clock.at(self.clock.now + self.work.reward_s, lambda: self._judge(group))
        else:
            self._group_done(group)

    def _judge(self, group: _Group) -> None:
        if self.groups.get(group.number) is group:
            self._group_done(group)


class _InTurn(_Loop):
    """max_lag 0."""

    def _start(self) -> None:
        self.step = 0
        self._begin()

    def _begin(self) -> None:
        self.kept: list[_Group] = []
        self.admission = Admission(
            target=self.work.groups, submit_size=self.work.submit_size or self.work.groups
        )
        self._submit()

    def _submit(self) -> None:
        groups = [self.issue() for _ in range(self.admission.wanted())]
        for group in groups:
            fresh = all(s.tokens == n for s, n in zip(group.sequences, group.lengths, strict=True))
            group.born = self.version if fresh else group.born
        self.admission.issue(len(groups))
        self.launch(groups)
        for group in groups:
            if not group.open:
                self.clock.at(self.clock.now, lambda group=group: self._judge(group))

    def _group_done(self, group: _Group) -> None:
        if self.admission.enough:
            return
        del self.groups[group.number]
        if self.admission.judge(_REFUSE if group.refused else _KEEP):
            self.kept.append(group)
        else:
            self.out.dropped += 1
        if self.admission.enough:
            self._settle()
            self.train(self.step, self.kept)
        else:
            self._submit()

    def _settle(self) -> None:
        """The rest is aborted: put back with what it has, or thrown away."""
        rest = list(self.groups.values())
        self.engines.cancel([s for group in rest for s in group.sequences])
        self.groups.clear()
        for group in rest:
            if self.work.partial:
                self.admission.take_back()
                self.buffer.append(group)
                self.out.put_back += 1
            else:
                self.admission.discard()
                self.out.discarded += 1

    def _published(self) -> None:
        self.step += 1
        self._begin()

    def _pending(self) -> int:
        assert self.admission.in_flight == 0, "a step that is over has nothing under way"
        return 0


class _Ahead(_Loop):
    """max_lag above 0."""

    def _start(self) -> None:
        work = self.work
        self.window = LagWindow(
            target=work.groups,
            max_lag=work.max_lag,
            submit_size=work.submit_size or work.groups,
            num_steps=work.steps,
        )
        self.window.publish(0)
        self.gathered: dict[int, list[_Group]] = {}
        self.admission: Admission | None = None
        self.kept: list[_Group] = []
        self.training: int | None = None
        self.trained_steps = 0
        self._pump()

    def _group_done(self, group: _Group) -> None:
        self.window.finish(group.number, group.born)
        self._pump()

    def _pump(self) -> None:
        """As far as it goes without waiting: `StreamRollout.__call__`, step after step."""
        while self.window.step < self.work.steps and self.window.may_begin(self.window.step):
            if self.admission is None:
                self.admission = Admission(
                    target=self.work.groups, submit_size=self.work.submit_size or self.work.groups
                )
                self.admission.issue(self.window.in_flight + self.window.waiting)
            self._let_go_of_stale(self.admission)
            self._submit(self.admission)
            number = self.window.next()
            if number is None:
                break
            self._look_at(number, self.admission)
            if self.admission.enough:
                self.gathered[self.window.step] = self.kept
                self.window.close_step()
                self.admission, self.kept = None, []
        self._train_next()

    def _look_at(self, number: int, admission: Admission) -> None:
        group = self.groups.pop(number)
        if admission.judge(_REFUSE if group.refused else _KEEP):
            self.window.keep(number)
            self.kept.append(group)
        else:
            self.window.drop(number, "filter")
            self.out.dropped += 1

    def _submit(self, admission: Admission) -> None:
        groups = [self.issue() for _ in range(self.window.wanted())]
        for group in groups:
            group.born = self.window.version
            self.window.issue(group.number)
        admission.issue(len(groups))
        self.launch(groups)

    def _let_go_of_stale(self, admission: Admission) -> None:
        for number in self.window.overdue():
            group = self.groups.pop(number)
            self.engines.cancel(group.sequences)
            admission.take_back()
            self.window.take_back(number)
            self.out.put_back += 1
            # Its prompts go back, its responses do not.
            group.sequences = [Sequence(-1, length) for length in group.lengths]
            self.buffer.append(group)

    def _train_next(self) -> None:
        if self.training is None and self.trained_steps in self.gathered:
            self.training = self.trained_steps
            self.train(self.training, self.gathered.pop(self.training))

    def _published(self) -> None:
        assert self.training is not None
        self.window.trained(self.training)
        self.window.publish(self.version)
        self.trained_steps, self.training = self.training + 1, None
        self._pump()

    def _pending(self) -> int:
        # The last step was trained; the window was not told, for the run ends with it.
        return self.window.pending - self.work.groups


def shared_out(tokens: Listed[int], ranks: int) -> list[int]:
    """Tokens of each rank, the longest sample first to the rank with the fewest tokens, as
    `DataParallel.share` does with micro-batches."""
    shares = [(0, rank) for rank in range(ranks)]
    for one in sorted(tokens, reverse=True):
        load, rank = shares[0]
        heapq.heapreplace(shares, (load + one, rank))
    return [load for load, _ in shares]
