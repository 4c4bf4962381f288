"""Filling one step: groups are started, judged as they finish, and the rest is aborted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from dovetail.compat.modules.filter_types import MetricGatherer
from dovetail.compat.modules.forms import bound
from dovetail.rollout.admit import Admission
from dovetail.types import DovetailError, DynamicFilterOutput, RolloutError
from dovetail.types.family import RolloutFnTrainOutput

log = logging.getLogger(__name__)

Group = list[Any]
"""Samples, or a list of samples where one fanned out."""
GetSamples = Callable[[int], list[Group]]


class Starter(Protocol):
    """What starts groups and holds them while they are under way."""

    pendings: set[asyncio.Task[Group]]
    remaining_batch_size: int
    """Groups kept or under way: plugins look at it."""

    def submit_generate_tasks(self, samples: list[Group]) -> None: ...


async def collect(
    args: Any,
    starter: Starter,
    get_samples: GetSamples,
    abort: Callable[[], Awaitable[list[Group]]],
) -> tuple[RolloutFnTrainOutput, list[Group]]:
    """`args.rollout_batch_size` groups by index, after the user's filters; and what `abort` gives.

    A group whose functions raise is left out and counted.

    Raises:
        RolloutError: too many groups in a row were dropped or failed, or there are no more.
    """
    step = _Step(args)
    while not step.admission.enough:
        step.top_up(starter, get_samples)
        done, starter.pendings = await asyncio.wait(
            starter.pendings, return_when=asyncio.FIRST_COMPLETED
        )
        for group in step.finished(done):
            await step.judge(group)
        starter.remaining_batch_size = step.admission.kept + step.admission.in_flight
    aborted = await abort()
    step.kept.sort(key=first_index)
    await step.after(get_samples)
    return RolloutFnTrainOutput(samples=step.kept, metrics=step.dropped.collect()), aborted


class _Step:
    def __init__(self, args: Any) -> None:
        size = args.rollout_batch_size
        self.args = args
        self.admission = Admission(
            target=size,
            submit_size=getattr(args, "over_sampling_batch_size", None) or size,
            max_dropped=getattr(args, "max_dropped_groups", 1000),
            max_failed=getattr(args, "max_failed_groups", 16),
        )
        self.keep = bound(args, "dynamic_sampling_filter_path", "dynamic_sampling_filter")
        self.kept: list[Group] = []
        self.seen: list[Group] = []
        self.dropped = MetricGatherer()

    def top_up(self, starter: Starter, get_samples: GetSamples) -> None:
        wanted = self.admission.wanted()
        if wanted:
            groups = get_samples(wanted)
            self.admission.issue(len(groups))
            starter.submit_generate_tasks(groups)
        if not starter.pendings:
            raise RolloutError(f"the data source gave no groups when asked for {wanted}")

    def finished(self, done: set[asyncio.Task[Group]]) -> list[Group]:
        groups = []
        for task in done:
            error = task.exception()
            if error is None:
                groups.append(task.result())
            elif isinstance(error, DovetailError):
                raise error
            else:
                log.warning("a group failed and is left out", exc_info=error)
                self.admission.fail(error)
        return sorted(groups, key=first_index)

    async def judge(self, group: Group) -> None:
        self.seen.append(group)
        if self.admission.enough:
            self.admission.discard()
            return
        verdict = DynamicFilterOutput(keep=True)
        if self.keep is not None:
            verdict = await self.keep(group)
        if self.admission.judge(verdict):
            self.kept.append(group)
        else:
            self.dropped.on_dynamic_filter_drop(verdict.reason)

    async def after(self, get_samples: GetSamples) -> None:
        """The user's functions that see the whole step."""
        sample_filter = bound(self.args, "rollout_sample_filter_path", "rollout_sample_filter")
        if sample_filter is not None:
            await sample_filter(self.kept)
        process = bound(
            self.args, "rollout_all_samples_process_path", "rollout_all_samples_process"
        )
        if process is not None:
            seen = sorted(self.seen, key=first_index)
            await process(seen, getattr(get_samples, "__self__", get_samples))


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """End tasks that nobody waits for any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def first_index(group: Group) -> int:
    """The index by which groups are sorted."""
    first = group[0][0] if isinstance(group[0], list) else group[0]
    return -1 if first.index is None else int(first.index)
