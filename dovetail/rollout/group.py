"""One group: its siblings generated at once, each scored when it is finished (or all together)."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dovetail.observe.trace import run_span
from dovetail.rollout.generate import generate, status_of
from dovetail.rollout.images import encode_images
from dovetail.rollout.sampling import mix_seed
from dovetail.types import DovetailError, GenerateCall, Group, HookRunError, Sample, SamplingParams
from dovetail.types.calls import RUNNING_CALL
from dovetail.types.ports import Engine, Scorer, Tokenizer

GenerateHook = Callable[[GenerateCall], Awaitable[Sample | list[Sample]]]
SampleHook = Callable[[Sample, int, bool], Awaitable[Sample | None]]
"""`(sample, rollout_id, evaluation)`; None keeps the sample, another one takes its place."""


@dataclass
class GroupRunner:
    """Makes and scores the responses of one group after another; groups run concurrently.

    generate (the sample's own function, else the run's, else the built-in one)
        -> sample hook on each sample that came back -> reward
    """

    engine: Engine
    tokenizer: Tokenizer
    scorer: Scorer
    generate: GenerateHook | None = None
    """The user's generate function; None: the built-in one."""
    resolve_generate: Callable[[str], GenerateHook] | None = None
    """From a sample's `generate_function_path` to a function of the same kind."""
    sample_hook: SampleHook | None = None
    rollout_id: int = 0
    group_rm: bool = False
    evaluation: bool = False
    max_context_len: int | None = None
    mask_offpolicy: bool = False
    """Do not train on what a resumed sample brought along."""
    processor: Any = None
    """What made the images' tensors, for the user's function."""
    return_routed_experts: bool = False
    """Have the engine record the experts of every token, for training to replay."""
    aborted: bool = False
    """Set by whoever ends the step: samples that have not started yet come back ABORTED at once."""

    async def run(self, group: Group, sampling: SamplingParams, *seed_parts: int | str) -> Group:
        """The finished group: siblings in order, each fanned-out sample in its sibling's place.

        A sample's seed comes from `seed_parts` and its index. Samples that came back ABORTED are
        not scored; a group with one of them is not scored as a group.

        Raises:
            DovetailError: the engine, the scorer or our checks failed.
            Exception: whatever the first failing sibling's generate function raised; by then all
                siblings have ended.
        """
        outcomes = await asyncio.gather(
            *(self._run_sample(sample, sampling, seed_parts) for sample in group),
            return_exceptions=True,
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in sorted(errors, key=lambda e: not isinstance(e, DovetailError)):
            raise error
        finished = [sample for made in outcomes if isinstance(made, list) for sample in made]
        unscored = any(sample.reward is None for sample in finished)
        if not self.group_rm or not all(is_finished(sample) for sample in finished):
            return finished
        for sample in finished:
            if is_odd(sample.reward):
                await self.scorer.score(sample)
        if unscored:
            with run_span(finished, "reward"):
                await self.scorer.score_group(finished)
        return finished

    async def _run_sample(
        self, sample: Sample, sampling: SamplingParams, seed_parts: tuple[int | str, ...]
    ) -> list[Sample]:
        if self.aborted and not is_finished(sample):
            sample.status = Sample.Status.ABORTED
            return [sample]
        if self.mask_offpolicy and sample.response_length and not is_done(sample):
            sample.loss_mask = [0] * sample.response_length
        seed = mix_seed(*seed_parts, sample.index if sample.index is not None else -1)
        made = await self._generated(sample, dataclasses.replace(sampling, seed=seed))
        for one in _scored(made):
            unscored = one.reward is None or is_odd(one.reward)
            if not self.group_rm and is_finished(one) and unscored:
                with run_span(one, "reward"):
                    await self.scorer.score(one)
                _share_reward(one, made)
        return made

    async def _generated(self, sample: Sample, sampling: SamplingParams) -> list[Sample]:
        """What became of a sample, after the sample hook. A user's function may clear the ids that
        it lies under, or make samples without any: they are put back."""
        ids, was_done = (sample.group_index, sample.index), is_done(sample)
        try:
            with run_span(sample, "generate"):
                made = await self._generate(sample, sampling)
        except asyncio.CancelledError:
            # Its function may have been cut off between two writes.
            sample.reset_for_retry()
            raise
        finally:
            sample.group_index, sample.index = ids
        made = _placed(made, *ids)
        if self.sample_hook is None or was_done:
            return made
        hooked = [
            (await self.sample_hook(one, self.rollout_id, self.evaluation)) or one for one in made
        ]
        return _placed(hooked, *ids)

    async def _generate(self, sample: Sample, sampling: SamplingParams) -> list[Sample]:
        generate_function = self._function_of(sample)
        if generate_function is None or is_done(sample):
            return [await self._default(sample, sampling)]
        call = GenerateCall(
            sample=sample,
            sampling=sampling,
            engine=self.engine,
            tokenizer=self.tokenizer,
            default=self._default,
            evaluation=self.evaluation,
            is_aborted=lambda: self.aborted,
            processor=self.processor,
        )
        RUNNING_CALL.set(call)
        return _checked(await generate_function(call), sample)

    def _function_of(self, sample: Sample) -> GenerateHook | None:
        path = sample.generate_function_path
        if path is None or self.resolve_generate is None:
            return self.generate
        return self.resolve_generate(path)

    async def _default(self, sample: Sample, sampling: SamplingParams) -> Sample:
        if self.processor is not None:
            encode_images(self.processor, sample)
        return await generate(
            self.engine,
            self.tokenizer,
            sample,
            sampling,
            max_context_len=self.max_context_len,
            return_routed_experts=self.return_routed_experts,
        )


def is_done(sample: Sample) -> bool:
    """No token will be added: it ended by itself or by a limit."""
    return status_of(sample) in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)


def is_odd(reward: Any) -> bool:
    """Whether something was set that is no reward: the scorer takes such samples out."""
    if reward is None or isinstance(reward, dict):
        return False
    try:
        return not math.isfinite(reward)
    except (TypeError, ValueError, OverflowError):
        return True


def is_finished(sample: Sample) -> bool:
    """It can be scored: everything but pending and aborted."""
    return status_of(sample) not in (Sample.Status.PENDING, Sample.Status.ABORTED)


def _scored(made: list[Sample]) -> list[Sample]:
    """Those that are scored one by one: of an agent's session the last, in which it came to its
    end."""
    return made[-1:] if all("strand" in one.metadata for one in made) else made


def _share_reward(scored: Sample, made: list[Sample]) -> None:
    """The other samples of the same session have the reward of what came of it."""
    for one in made:
        if "strand" in one.metadata and one.reward is None:
            one.reward, one.remove_sample = scored.reward, scored.remove_sample


def _checked(made: Any, sample: Sample) -> list[Sample]:
    """What a generate function gave back, as a list."""
    samples = list(made) if isinstance(made, list | tuple) else [made]
    if not samples or not all(isinstance(one, Sample) for one in samples):
        got = "an empty list" if made == [] else f"{type(made).__name__} ({str(made)[:80]!r})"
        raise HookRunError(
            f"the generate function gave back {got} for sample {sample.index}; expected a Sample "
            "or a list of Samples (--custom-generate-function-path, TOML "
            "hooks.custom_generate_function_path)"
        )
    return samples


def _placed(samples: list[Sample], group_index: int | None, index: int | None) -> list[Sample]:
    """The samples, knowing where they belong: to the group of the sample that was answered."""
    for one in samples:
        one.group_index = one.group_index if group_index is None else group_index
        one.index = index if one.index is None else one.index
        if len(samples) > 1 and one.rollout_id is None:
            one.rollout_id = index
        if status_of(one) is Sample.Status.PENDING:
            one.status = Sample.Status.COMPLETED
    return samples
