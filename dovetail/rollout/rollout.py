"""The default rollout function: collects the groups of one step.

source.get_samples --> Flight: groups run concurrently --next finished--> filter --> Admission
      ^                                                                                 |
      | partial rollout: unfinished and surplus groups                                  | enough
      +------------------------------ land <------------ engine.abort <-----------------+
                                        |
                                        +--> sample filter (kept groups)
                                        +--> all-samples process (every group that finished)
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from dovetail.config.sections import RolloutConfig
from dovetail.rollout.admit import Admission
from dovetail.rollout.flight import Flight, Landed
from dovetail.rollout.group import (
    GenerateHook,
    GroupRunner,
    SampleHook,
    is_done,
    is_finished,
)
from dovetail.rollout.measure import rollout_metrics
from dovetail.rollout.sampling import rollout_sampling
from dovetail.rollout.teacher import Lessons, TeacherClient
from dovetail.types import (
    DovetailError,
    DynamicFilterOutput,
    Group,
    RolloutError,
    RolloutOutput,
)
from dovetail.types.ports import DataSource, Engine, Scorer, Tokenizer

log = logging.getLogger(__name__)

GroupFilter = Callable[[Group], Any]
"""Group -> DynamicFilterOutput, or an awaitable of one."""
SampleFilter = Callable[[list[Group]], Awaitable[None]]
"""Takes samples out of the loss, by setting `remove_sample`."""
AllSamples = Callable[[list[Group], DataSource], Awaitable[None]]
OnProgress = Callable[[int, int, int], None]
"""(groups kept, groups wanted, response tokens so far) after every finished group."""

_FAILURES_LOGGED = 3
_MOST_GROUPS = 1 << 20
"""Of a step: what keeps numbers of groups apart that their source did not number."""


class Rollout:
    """Collects `rollout_batch_size` groups per call.

    Args:
        scorer: sets rewards; its errors end the run.
        seed: a sample's sampling seed comes from it and the sample's index.
        generate: the user's generate function, taking a `GenerateCall`.
        resolve_generate: from a sample's `generate_function_path` to such a function.
        sample_hook: gets each sample that was generated, before its reward.
        group_filter: says of each finished group whether the step takes it.
        sample_filter: gets the groups of the step, once there are enough.
        all_samples: gets every group that finished until then, those that the filter refused too.
        group_rm: score whole groups instead of samples.
        reward_key: entry of dict rewards that the metrics show.
        reward_objects: rewards may be objects that only the user's functions read.
        max_context_len: most tokens of prompt plus response that the engine takes.
        return_routed_experts: have the engine record the experts of every token.
        teacher: gives `teacher_log_probs` to the samples of groups that the step keeps.
        processor: of a model that reads images, for the user's functions.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        source: DataSource,
        scorer: Scorer,
        rollout: RolloutConfig,
        *,
        seed: int,
        generate: GenerateHook | None = None,
        resolve_generate: Callable[[str], GenerateHook] | None = None,
        sample_hook: SampleHook | None = None,
        group_filter: GroupFilter | None = None,
        sample_filter: SampleFilter | None = None,
        all_samples: AllSamples | None = None,
        group_rm: bool = False,
        reward_key: str | None = None,
        reward_objects: bool = False,
        max_context_len: int | None = None,
        return_routed_experts: bool = False,
        teacher: TeacherClient | None = None,
        processor: Any = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.engine, self.source, self.config, self.seed = engine, source, rollout, seed
        self.group_filter, self.reward_key = group_filter, reward_key
        self.reward_objects = reward_objects
        self.sample_filter, self.all_samples = sample_filter, all_samples
        self.on_progress, self.teacher = on_progress, teacher
        self._make_runner = lambda rollout_id: GroupRunner(
            engine,
            tokenizer,
            scorer,
            generate,
            resolve_generate,
            sample_hook,
            rollout_id,
            group_rm=group_rm,
            max_context_len=rollout.rollout_max_context_len or max_context_len,
            mask_offpolicy=rollout.mask_offpolicy_in_partial_rollout,
            return_routed_experts=return_routed_experts,
            processor=processor,
        )

    async def __call__(self, rollout_id: int) -> RolloutOutput:
        """The groups of step `rollout_id`, sorted by group index, with metrics `rollout/...`.

        Groups that the step does not need go back to the source under partial rollout, and are
        discarded and counted otherwise.

        Raises:
            RolloutError: too many groups in a row were dropped or failed, or the source gave none.
            EngineError: the engine failed.
        """
        runner, admission = self._make_runner(rollout_id), self._admission()
        sampling = rollout_sampling(self.config)
        flight = Flight(lambda group: runner.run(group, sampling, self.seed))
        lessons = Lessons(self.teacher)
        kept: list[Group] = []
        finished: list[Group] = []
        tokens = 0
        try:
            while not admission.enough:
                self._submit(admission, flight, rollout_id)
                landed = await flight.next()
                tokens += landed.new_tokens
                if await self._admit(landed, admission):
                    kept.append(landed.made or [])
                    lessons.begin(kept[-1])
                if self.all_samples is not None and _all_finished(landed):
                    finished.append(landed.made or [])
                self._report(admission, tokens)
            if flight.in_air:
                runner.aborted = True
                await self.engine.abort()
                # Without partial rollout nothing of the rest is used: do not wait for its judges.
                grace_s = self.config.abort_grace_s if self.config.partial_rollout else 0.0
                surplus = await flight.land(grace_s)
                tokens += sum(landed.new_tokens for landed in surplus)
                self._settle(surplus, admission, rollout_id)
            await self._show(kept, finished)
            await lessons.end()
        except BaseException:
            runner.aborted = True
            await self.engine.abort()
            await flight.cancel()
            await lessons.cancel()
            raise
        metrics = rollout_metrics(kept, admission, tokens, self.reward_key, self.reward_objects)
        return RolloutOutput(kept, metrics)

    def _admission(self) -> Admission:
        config = self.config
        return Admission(
            target=config.rollout_batch_size,
            submit_size=config.over_sampling_batch_size or config.rollout_batch_size,
            max_dropped=config.max_dropped_groups,
            max_failed=config.max_failed_groups,
        )

    def _submit(self, admission: Admission, flight: Flight, rollout_id: int) -> None:
        wanted = admission.wanted()
        groups = self.source.get_samples(wanted) if wanted else []
        for number, group in enumerate(groups, start=admission.issued):
            number_group(group, rollout_id, number)
        admission.issue(len(groups))
        flight.launch(groups)
        if not flight.in_air:
            raise no_prompts(wanted, admission)

    async def _admit(self, landed: Landed, admission: Admission) -> bool:
        """Count a group that finished while the step still needs groups; True: it is kept."""
        if landed.made is None:
            self._fail(landed, admission)
            return False
        if not _all_finished(landed):
            # Nobody asked for the abort: the user's generate function gave up on a sample.
            admission.drop("aborted")
            return False
        return admission.judge(await self._filter(landed.made))

    async def _filter(self, group: Group) -> DynamicFilterOutput:
        if self.group_filter is None:
            return DynamicFilterOutput(keep=True)
        output = self.group_filter(group)
        output = await output if inspect.isawaitable(output) else output
        if isinstance(output, DynamicFilterOutput):
            return output
        return DynamicFilterOutput(keep=bool(output))

    def _fail(self, landed: Landed, admission: Admission) -> None:
        error = landed.error or RuntimeError("its generate function cancelled itself")
        if isinstance(error, DovetailError):
            raise error
        if admission.failed.total() < _FAILURES_LOGGED:
            index = landed.prompts[0].group_index if landed.prompts else None
            log.warning("group %s failed and is left out", index, exc_info=error)
        admission.fail(error)

    def _settle(self, surplus: list[Landed], admission: Admission, rollout_id: int) -> None:
        """Groups that the step does not need: back to the source, or discarded."""
        for landed in surplus:
            if isinstance(landed.error, DovetailError):
                raise landed.error
            if self.config.partial_rollout:
                admission.take_back()
            else:
                admission.discard()
        if self.config.partial_rollout:
            self.source.add_samples([resumable(landed, rollout_id) for landed in surplus])

    async def _show(self, kept: list[Group], finished: list[Group]) -> None:
        """What the step has and what it saw, in order, to the functions that ask for it."""
        kept.sort(key=_group_index)
        if self.sample_filter is not None:
            await self.sample_filter(kept)
        if self.all_samples is not None:
            finished.sort(key=_group_index)
            await self.all_samples(finished, self.source)

    def _report(self, admission: Admission, tokens: int) -> None:
        if self.on_progress is not None:
            self.on_progress(admission.kept, admission.target, tokens)


def no_prompts(wanted: int, admission: Admission) -> RolloutError:
    """What a step ends with that can't be filled."""
    return RolloutError(
        f"the data source gave no prompts: {wanted} groups were asked for, the step has "
        f"{admission.kept} of {admission.target} (--prompt-data, TOML: data.prompt_data)"
    )


def number_group(group: Group, rollout_id: int, place: int) -> None:
    """Ids for samples of a user's source that have none: seeds and groups are known by them."""
    number = rollout_id * _MOST_GROUPS + place
    for offset, sample in enumerate(group):
        if sample.group_index is None:
            sample.group_index = number
        if sample.index is None:
            sample.index = number * len(group) + offset


def resumable(landed: Landed, rollout_id: int) -> Group:
    """The group as the source takes it back: one sample per sibling, unfinished ones ABORTED.

    A sibling that fanned out, raised or was cut off starts again from its prompt; another keeps its
    response and is marked with the step in which that began (`metadata["start_rollout_id"]`).
    """
    group = landed.made if landed.made is not None else landed.prompts
    if landed.cut_off:
        # A thread of the user's may still write to the old ones.
        group = copy.deepcopy(group)
    whole = len(group) == len(landed.prompts) and landed.error is None
    group = group if whole else landed.prompts
    for sample in group:
        if not whole:
            sample.reset_for_retry()
        elif not is_done(sample):
            sample.status = sample.Status.ABORTED
        if sample.response_length:
            sample.metadata.setdefault("start_rollout_id", rollout_id)
    return group


def _all_finished(landed: Landed) -> bool:
    return landed.made is not None and all(is_finished(sample) for sample in landed.made)


def _group_index(group: Group) -> int:
    index = group[0].group_index if group else None
    return -1 if index is None else index
