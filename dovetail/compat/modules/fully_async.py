"""`rollout.fully_async_rollout`: a rollout function that goes on generating while others train.

    data source -> producer: always `max_groups` groups under way, across steps -> buffer -> drain

A step takes the groups that are finished and waits only for those that are missing, so the longest
response of a step no longer holds it up. Groups made under older weights are trained on with the
versions that they carry (correct for them with --use-tis), up to `args.max_weight_staleness`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from dovetail.compat.modules import inference_rollout, rollout
from dovetail.compat.modules.async_buffer import (
    DataBuffer,
    DataBufferConstructorInput,
    DataBufferInput,
    DefaultDataBuffer,
    group_oldest_weight_version,
)
from dovetail.compat.modules.async_loop import get_async_loop, run
from dovetail.compat.modules.base_types import (
    BaseRolloutFn,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnInput,
    RolloutFnOutput,
    RolloutFnTrainOutput,
)
from dovetail.compat.modules.collect import Group, cancel, first_index
from dovetail.compat.modules.filter_types import MetricGatherer, iter_samples
from dovetail.compat.modules.forms import bound
from dovetail.compat.modules.misc import load_function
from dovetail.rollout.admit import Admission
from dovetail.types import DovetailError, DynamicFilterOutput, RolloutError, Sample

__all__ = ["AsyncRolloutWorker", "FullyAsyncRolloutFn", "generate_rollout_fully_async"]

log = logging.getLogger(__name__)


class Producer:
    """Keeps groups under way, and puts each into a buffer when it is finished.

    Lives on one event loop. An unfinished group goes back to the data source; one that raises is
    left out, and too many of them in a row end the producer, and with it the next step.
    """

    def __init__(
        self, args: Any, data_source: Any, make: Callable[[Group], Awaitable[Group]]
    ) -> None:
        self.args, self.data_source, self._make = args, data_source, make
        buffer = load_function(getattr(args, "custom_async_data_buffer_path", None))
        given = DataBufferConstructorInput(args, self.recycle)
        self.buffer: DataBuffer = (buffer or DefaultDataBuffer)(given)
        self.max_groups = _max_groups(args)
        self.recycled = 0
        self.resumed = asyncio.Event()
        """Cleared while no new groups are to be started."""
        self.resumed.set()
        self._failures_in_a_row = 0
        self.task = asyncio.get_running_loop().create_task(self._produce())

    async def next(self) -> DataBufferInput:
        """The next finished group.

        Raises:
            RolloutError: the producer ended: too many failures, or no more prompts.
        """
        taken = asyncio.ensure_future(self.buffer.get())
        await asyncio.wait({taken, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if taken.done():
            return taken.result()
        taken.cancel()
        self.task.result()
        raise RolloutError("the data source gave no more groups, and none is left in the buffer")

    def recycle(self, prompts: list[Sample]) -> None:
        """Have these prompts answered again, from the beginning."""
        for sample in prompts:
            sample.reset_for_retry()
        self.data_source.add_samples([prompts])
        self.recycled += 1

    async def close(self) -> None:
        """End everything that is under way."""
        await cancel([self.task])

    async def _produce(self) -> None:
        active: dict[asyncio.Task[Group], Group] = {}
        try:
            while True:
                await self.resumed.wait()
                self._top_up(active)
                if not active:
                    return
                done, _ = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in active if task in done]:
                    await self._finished(active.pop(task), task)
        finally:
            await cancel(list(active))

    def _top_up(self, active: dict[asyncio.Task[Group], Group]) -> None:
        while len(active) < self.max_groups and (groups := self.data_source.get_samples(1)):
            active |= {asyncio.ensure_future(self._make(group)): group for group in groups}

    async def _finished(self, prompts: Group, task: asyncio.Task[Group]) -> None:
        error = task.exception()
        if error is not None:
            self._failed(error)
            return
        self._failures_in_a_row = 0
        group = task.result()
        if any(Sample.Status(s.status) is Sample.Status.ABORTED for s in iter_samples(group)):
            if any(isinstance(member, list) for member in group):
                self.recycle(prompts)
            else:
                # What it has of a response stays, and is gone on with under newer weights.
                self.data_source.add_samples([group])
                self.recycled += 1
            return
        versions = [int(v) for s in iter_samples(group) for v in s.weight_versions if v.isdigit()]
        await self.buffer.put(DataBufferInput(prompts, group, max(versions, default=None)))

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, DovetailError):
            raise error
        self._failures_in_a_row += 1
        log.warning("a group failed and is left out", exc_info=error)
        allowed = getattr(self.args, "max_failed_groups", 16)
        if self._failures_in_a_row >= allowed:
            raise RolloutError(
                f"{allowed} groups in a row failed; the last with {type(error).__name__}: {error} "
                "(--max-failed-groups, TOML: rollout.max_failed_groups)"
            ) from error


def _max_groups(args: Any) -> int:
    samples = getattr(args, "async_max_concurrent_samples", None)
    if samples is None:
        return int(args.rollout_batch_size)
    return max(1, samples // args.n_samples_per_prompt)


async def drain(producer: Producer, rollout_id: int) -> RolloutFnTrainOutput:
    """The groups of step `rollout_id`: those that are finished, then those that finish next.

    Raises:
        RolloutError: too many groups in a row were dropped, or the producer ended.
    """
    args, size = producer.args, producer.args.rollout_batch_size
    keep = bound(args, "dynamic_sampling_filter_path", "dynamic_sampling_filter")
    admission = Admission(size, size, max_dropped=getattr(args, "max_dropped_groups", 1000))
    max_staleness = getattr(args, "max_weight_staleness", None)
    dropped, kept, staleness = MetricGatherer(), [], []
    newest = rollout_id
    while not admission.enough:
        entry = await producer.next()
        newest = max(newest, entry.weight_version or 0)
        oldest = group_oldest_weight_version(entry.group)
        behind = newest - oldest if oldest is not None else 0
        admission.issue(1)
        if max_staleness is not None and behind > max_staleness:
            producer.recycle(entry.prompt_group)
            admission.drop("stale")
            continue
        verdict = DynamicFilterOutput(keep=True) if keep is None else await keep(entry.group)
        if admission.judge(verdict):
            kept.append(entry.group)
            staleness.append(behind)
        else:
            dropped.on_dynamic_filter_drop(verdict.reason)
    kept.sort(key=first_index)
    sample_filter = bound(args, "rollout_sample_filter_path", "rollout_sample_filter")
    if sample_filter is not None:
        await sample_filter(kept)
    return RolloutFnTrainOutput(kept, {**dropped.collect(), **_metrics(producer, staleness)})


def _metrics(producer: Producer, staleness: list[int]) -> dict[str, float]:
    metrics = {
        "avg_staleness": sum(staleness) / len(staleness),
        "max_staleness": float(max(staleness)),
        "recycled_groups": float(producer.recycled),
        **producer.buffer.get_metrics(),
    }
    producer.recycled = 0
    return {f"rollout/fully_async/{name}": value for name, value in metrics.items()}


class AsyncRolloutWorker:
    """slime's worker: a producer on the background loop, for code that is not async."""

    def __init__(self, args: Any, data_buffer: Any, concurrency: int | None = None) -> None:
        self.args, self.data_buffer = args, data_buffer
        self.running = False
        self._concurrency = concurrency
        self._producer: Producer | None = None

    @property
    def worker_thread(self) -> threading.Thread:
        """The thread that the groups are made on."""
        return get_async_loop().thread

    @property
    def producer(self) -> Producer:
        """What makes the groups; started if it is not."""
        self.start()
        assert self._producer is not None
        return self._producer

    def start(self) -> None:
        """Begin to generate; a second call does nothing."""
        if self._producer is None:
            self._producer, self.running = run(self._make_producer()), True

    def stop(self) -> None:
        """End what is under way."""
        if self._producer is not None:
            run(self._producer.close())
        self._producer, self.running = None, False

    def get_completed_groups(self, limit: int | None = None) -> list[tuple[int, Group]]:
        """Finished groups by number, `limit` at most; does not wait."""
        self.start()
        return run(self._completed(limit))

    def queue_size(self) -> int:
        """Finished groups that wait."""
        buffer = self.producer.buffer
        return len(buffer) if isinstance(buffer, DefaultDataBuffer) else 0

    async def _make_producer(self) -> Producer:
        state = rollout.GenerateState(self.args)

        async def make(group: Group) -> Group:
            sampling = dict(state.sampling_params)
            return await rollout.generate_and_rm_group(self.args, group, sampling)

        producer = Producer(self.args, self.data_buffer, make)
        if self._concurrency is not None:
            per_group = getattr(self.args, "n_samples_per_prompt", 1)
            producer.max_groups = max(1, self._concurrency // per_group)
        return producer

    async def _completed(self, limit: int | None) -> list[tuple[int, Group]]:
        buffer = self.producer.buffer
        groups: list[tuple[int, Group]] = []
        while isinstance(buffer, DefaultDataBuffer) and (limit is None or len(groups) < limit):
            entry = buffer.get_nowait()
            if entry is None:
                break
            groups.append((entry.group[0].group_index or 0, entry.group))
        return groups


def generate_rollout_fully_async(
    args: Any, rollout_id: int, data_buffer: Any, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """A rollout function of slime's form; its worker lives until the run ends."""
    if evaluation:
        return run(rollout.eval_rollout(args, rollout_id))[0]
    return run(drain(_worker_of(args, data_buffer).producer, rollout_id))


def _worker_of(args: Any, data_buffer: Any) -> AsyncRolloutWorker:
    global _worker
    with _lock:
        if _worker is not None and _worker.data_buffer is not data_buffer:
            _worker.stop()
            _worker = None
        if _worker is None:
            _worker = AsyncRolloutWorker(args, data_buffer)
            _worker.start()
        return _worker


def stop_worker() -> None:
    """End the worker of `generate_rollout_fully_async`, if there is one."""
    global _worker
    with _lock:
        if _worker is not None:
            _worker.stop()
        _worker = None


class FullyAsyncRolloutFn(BaseRolloutFn):
    """miles' class: a producer on the loop that calls it."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        super().__init__(input)
        self.state = inference_rollout.GenerateState(input.args)
        self._producer: Producer | None = None

    async def __call__(self, input: RolloutFnInput) -> RolloutFnOutput:
        """The samples of one step or the results of one evaluation."""
        if isinstance(input, RolloutFnEvalInput):
            return await self._evaluate(input)
        if self._producer is None:
            self._producer = Producer(self.args, self.data_source, self._make)
        return await drain(self._producer, input.rollout_id)

    async def _make(self, group: Group) -> Group:
        sampling = dict(self.state.sampling_params)
        return await inference_rollout.generate_and_rm_group(self.state, group, sampling)

    async def _evaluate(self, input: RolloutFnEvalInput) -> RolloutFnEvalOutput:
        """On the training's engines nothing new is started meanwhile."""
        if input.generate_state is None and self._producer is not None:
            self._producer.resumed.clear()
        try:
            state = input.generate_state or self.state
            return RolloutFnEvalOutput(await inference_rollout.run_eval_datasets(state))
        finally:
            if self._producer is not None:
                self._producer.resumed.set()


_worker: AsyncRolloutWorker | None = None
_lock = threading.Lock()
