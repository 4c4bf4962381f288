"""The rollout of a run whose generation goes on during training (max_lag above 0).

    source --> window.wanted --> Flight: groups run concurrently, across steps and publishes
      ^                              |
      |                              v made
      |                    window (or the user's buffer) --next--> filter --> the step
      |                              |                               |
      +------- too old, put back ----+                               +--> refused: gone

What `Rollout` does for one step after another this does for all steps that are open: a step takes
groups that were made meanwhile, and what it does not need is the next one's. Nothing is aborted
between steps but what has become too old for all steps to come. A publish only holds requests:
they go on under the new weights, and their tokens say which is which. An engine that breaks its
requests off instead gives groups back unfinished: they are started again with what they have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dovetail.rollout.admit import Admission
from dovetail.rollout.flight import Flight, Landed
from dovetail.rollout.group import is_finished
from dovetail.rollout.lag import LagWindow
from dovetail.rollout.measure import lag_metrics, rollout_metrics
from dovetail.rollout.pending import Pending, oldest_version, start_over
from dovetail.rollout.rollout import Rollout, no_prompts, number_group, resumable
from dovetail.rollout.sampling import rollout_sampling
from dovetail.rollout.teacher import Lessons
from dovetail.rollout.waiting import UserBuffer
from dovetail.types import Group, RolloutOutput


@dataclass
class Filling:
    """The step that is collected now."""

    number: int
    admission: Admission
    lessons: Lessons
    carried: int
    """Groups that were issued for earlier steps."""
    kept: list[Group] = field(default_factory=list)
    finished: list[Group] = field(default_factory=list)
    tokens: int = 0
    stale: int = 0


class StreamRollout(Rollout):
    """Collects `rollout_batch_size` groups per call, and goes on making others between calls.

    Args:
        positional, named: as `Rollout` takes them.
        make_buffer: makes what finished groups wait in, of the user's; None: the window alone says
            whose turn it is.
    """

    def __init__(self, *positional: Any, make_buffer: Any = None, **named: Any) -> None:
        super().__init__(*positional, **named)
        self._make_buffer, self._by_user = make_buffer, named.get("generate") is not None
        self._sampling = rollout_sampling(self.config)
        self.starts_at(0, None)

    def starts_at(self, step: int, num_steps: int | None) -> None:
        """Begin anew: the first step that is collected, and how many the run has."""
        config = self.config
        capacity = config.async_data_buffer_capacity_factor
        most = config.async_max_concurrent_samples
        self.window = LagWindow(
            target=config.rollout_batch_size,
            max_lag=config.max_lag,
            submit_size=config.over_sampling_batch_size or config.rollout_batch_size,
            max_open=None if capacity is None else max(1, int(capacity)),
            max_in_flight=None if most is None else max(1, most // config.n_samples_per_prompt),
            keeps_stale=config.async_unused_samples_handler == "keep",
            num_steps=num_steps,
            step=step,
        )
        self._pending = Pending(whole_siblings=not self._by_user)
        self._runner = self._make_runner(step)
        self._flight = Flight(self._run)
        make = self._make_buffer
        self._buffer = None if make is None else UserBuffer(make, self._evicted)
        self._filling: Filling | None = None
        self._updating = False

    def may_begin(self, step: int) -> bool:
        """Whether a step may be collected now."""
        return self.window.may_begin(step)

    def updating(self) -> None:
        """Engines are about to get new weights: what they break off meanwhile goes on after it."""
        self._updating = True

    def published(self, version: int) -> None:
        """Called on the loop, when engines have new weights: more may be made."""
        self._updating = False
        self.window.publish(version)
        if self._filling is not None and not self._filling.admission.enough:
            self._submit_all(self._filling)

    def trained(self, step: int) -> None:
        """A step was trained."""
        self.window.trained(step)
        self._pending.settle(step)

    def unused(self) -> list[Group]:
        """Copies of all groups that were taken from the source and are not trained or gone."""
        return self._pending.unused()

    async def close(self) -> None:
        """End what is under way."""
        self._runner.aborted = True
        await self._flight.cancel()

    async def __call__(self, rollout_id: int) -> RolloutOutput:
        """The groups of step `rollout_id`, sorted by group index, with metrics `rollout/...`.

        Raises:
            RolloutError: too many groups in a row were dropped or failed, or the source gave none.
            EngineError: the engine failed.
        """
        assert rollout_id == self.window.step, "steps are collected in order"
        own = self._begin(rollout_id)
        try:
            while not own.admission.enough:
                await self._let_go_of_stale(own)
                self._submit_all(own)
                await self._take(own)
            for number in self.window.close_step():
                self._pending[number].step = rollout_id
            await self._show(own.kept, own.finished)
            await own.lessons.end()
        except BaseException:
            await self.close()
            await own.lessons.cancel()
            raise
        finally:
            self._filling = None
        return RolloutOutput(own.kept, self._metrics(own))

    def _begin(self, step: int) -> Filling:
        admission = self._admission()
        # Those of earlier calls that this step may get.
        carried = self.window.in_flight + self.window.waiting
        admission.issue(carried)
        self._runner = self._make_runner(step)
        self._filling = Filling(step, admission, Lessons(self.teacher), carried)
        return self._filling

    async def _run(self, group: Group) -> Group:
        return await self._runner.run(group, self._sampling, self.seed)

    def _submit_all(self, own: Filling) -> None:
        """Start what the window wants."""
        wanted = self.window.wanted()
        groups = self.source.get_samples(wanted) if wanted else []
        first = self.window.issued
        for offset, group in enumerate(groups):
            number_group(group, own.number, first + offset)
            oldest = oldest_version(group)
            if oldest is not None and self.window.is_stale(oldest):
                start_over(group)
                own.stale += 1
        own.admission.issue(len(groups))
        for number, group in zip(self._flight.launch(groups), groups, strict=True):
            self._pending.issue(number, group, self.window.version)
            self.window.issue(number, oldest_version(group))
        if not (self.window.in_flight or self.window.waiting):
            raise no_prompts(wanted, own.admission)

    async def _take(self, own: Filling) -> None:
        """One group that was made goes into the step or out; or one more is made."""
        for landed in self._flight.landed():
            await self._land(landed, own)
        number = self.window.next() if self._buffer is None else await self._buffer.next()
        if number is None:
            await self._land(await self._flight.next(), own)
            return
        if self.window.is_stale(self.window.oldest(number)):
            # Only a buffer of the user's gives such.
            own.stale += 1
            self._let_go(number, own)
            return
        made = self._landed(number).made or []
        if self.all_samples is not None:
            own.finished.append(made)
        verdict = await self._filter(made)
        if own.admission.judge(verdict):
            self.window.keep(number)
            own.kept.append(made)
            own.lessons.begin(made)
        else:
            self.window.drop(number, verdict.reason or "unnamed")
            self._pending.give_up(number, own.number)
        self._report(own.admission, own.tokens)

    async def _land(self, landed: Landed, own: Filling) -> None:
        number, made = landed.number, landed.made
        own.tokens += landed.new_tokens
        if made is None:
            self._fail(landed, own.admission)
            self.window.drop(number, "failed")
            self._pending.give_up(number, own.number)
        elif all(is_finished(sample) for sample in made):
            self._pending[number].landed = landed
            self.window.finish(number, oldest_version(made))
            if self._buffer is not None:
                await self._buffer.put(number, self._pending[number].before, made)
        elif self._updating or self._pending[number].version < self.window.version:
            # New weights come, or came while it was made, and its engine broke it off.
            group = resumable(landed, own.number)
            self._pending[number].version = self.window.version
            self._pending[number].prompts = group
            self.window.again(number, oldest_version(group))
            self._flight.again(number, group)
        else:
            # Nobody asked for it: the user's generate function gave up on a sample.
            own.admission.drop("aborted")
            self.window.drop(number, "aborted")
            self._pending.give_up(number, own.number)

    async def _let_go_of_stale(self, own: Filling) -> None:
        """Groups that no step from now on may train: their prompts go back, or are given up."""
        overdue = self.window.overdue()
        if self._buffer is not None:
            overdue = [number for number in overdue if not self._buffer.holds(number)]
        if overdue:
            await self._flight.cut(overdue)
        for number in overdue:
            own.stale += 1
            self._let_go(number, own)

    def _let_go(self, number: int, own: Filling) -> None:
        if self.config.async_unused_samples_handler == "drop":
            own.admission.discard()
            self.window.drop(number, "stale")
            self._pending.give_up(number, own.number)
            return
        own.admission.take_back()
        self.window.take_back(number)
        self.source.add_samples([start_over(self._pending.take_out(number))])

    def _evicted(self, number: int) -> None:
        """The user's buffer has no room for a group: it goes as one that is too old."""
        assert self._filling is not None, "buffers are used while a step is collected"
        self._let_go(number, self._filling)

    def _landed(self, number: int) -> Landed:
        landed = self._pending[number].landed
        assert landed is not None, "what waits was made"
        return landed

    def _metrics(self, own: Filling) -> dict[str, float]:
        kept = own.kept
        metrics = rollout_metrics(
            kept, own.admission, own.tokens, self.reward_key, self.reward_objects
        )
        metrics |= lag_metrics(kept, own.number, self.config.max_lag)
        metrics["rollout/issued_groups"] -= own.carried
        metrics["rollout/stale_groups"] = float(own.stale)
        metrics["rollout/waiting_groups"] = float(self.window.waiting)
        metrics["rollout/in_flight_groups"] = float(self.window.in_flight)
        if self._buffer is not None:
            metrics |= self._buffer.metrics()
        return metrics
