"""Evaluation: several named sets, each with its own sampling and rewards, answered at once."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.rollout.group import GenerateHook, GroupRunner, SampleHook
from dovetail.rollout.measure import columns, mean, reward_value, shape_metrics
from dovetail.types import (
    DovetailError,
    EvalOutput,
    Group,
    RolloutError,
    Sample,
    SamplingParams,
)
from dovetail.types.ports import Engine, Scorer, Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSet:
    """One held-out set."""

    name: str
    """Part of its metrics' names: `eval/<name>/...`."""
    samples: Sequence[Sample]
    """One prototype per prompt; evaluation works on copies."""
    n_samples: int = 1
    """Responses per prompt."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    reward_key: str | None = None
    """Entry of a dict reward that is reported."""
    rm_type: str | None = None
    """Built-in reward of this set; None: the run's."""
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Laid over every sample's metadata."""


class Evaluation:
    """Answers every prompt of every set `n_samples` times, scores, and reports.

    Args:
        scorer: sets rewards; its errors end the run.
        seed: seeds come from it, the set's name and the position, so the same policy gives the same
            answers whenever it is evaluated.
        generate: the user's generate function, taking a `GenerateCall` with `evaluation` true.
        resolve_generate: from a sample's or a set's own path to such a function.
        sample_hook: gets each sample that was generated, before its reward.
        group_rm: score the samples of a prompt at once.
        max_context_len: most tokens of prompt plus response that the engine takes.
        log_passrate: report pass@k of sets with several samples per prompt.
        on_progress: (prompts done, prompts, response tokens so far) after every prompt.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sets: Sequence[EvalSet],
        scorer: Scorer,
        *,
        seed: int,
        generate: GenerateHook | None = None,
        resolve_generate: Callable[[str], GenerateHook] | None = None,
        sample_hook: SampleHook | None = None,
        group_rm: bool = False,
        max_context_len: int | None = None,
        log_passrate: bool = True,
        on_progress: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self.engine, self.sets, self.seed = engine, list(sets), seed
        self.log_passrate, self.on_progress = log_passrate, on_progress
        self._make_runner = lambda rollout_id: GroupRunner(
            engine,
            tokenizer,
            scorer,
            generate,
            resolve_generate,
            sample_hook,
            rollout_id,
            group_rm=group_rm,
            evaluation=True,
            max_context_len=max_context_len,
        )

    async def __call__(self, rollout_id: int = 0) -> EvalOutput:
        """Samples in dataset order, and metrics `eval/<name>/...`.

        They are `reward`, `response_length`, `response_length_max`, `truncated`, `samples`,
        `failed` and `pass@k`. A prompt whose generate function raised counts as FAILED with
        reward 0.

        Raises:
            RolloutError: every sample of a set failed, or a reward is missing.
            EngineError: the engine failed.
        """
        runner = self._make_runner(rollout_id)
        asked = [(one, group) for one in self.sets for group in prompts_of(one)]
        progress = _Progress(len(asked), self.on_progress)

        async def answer(one: EvalSet, group: Group) -> Group:
            made = await _answer(runner, one, group, self.seed)
            progress.add(made)
            return made

        tasks = [asyncio.create_task(answer(one, group)) for one, group in asked]
        try:
            answered = await asyncio.gather(*tasks)
        except BaseException:
            runner.aborted = True
            await self.engine.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        by_set: dict[str, list[Group]] = {one.name: [] for one in self.sets}
        for (one, _), made in zip(asked, answered, strict=True):
            by_set[one.name].append(made)
        metrics: dict[str, float] = {}
        for one in self.sets:
            metrics |= _set_metrics(one, by_set[one.name], self.log_passrate)
        data = {name: [s for group in groups for s in group] for name, groups in by_set.items()}
        shown = {one.name: columns(data[one.name], one.reward_key) for one in self.sets}
        return EvalOutput(data, metrics, shown)


@dataclass
class _Progress:
    total: int
    report: Callable[[int, int, int], None] | None
    done: int = 0
    tokens: int = 0

    def add(self, group: Group) -> None:
        self.done += 1
        self.tokens += sum(sample.response_length for sample in group)
        if self.report is not None:
            self.report(self.done, self.total, self.tokens)


def prompts_of(one: EvalSet) -> list[Group]:
    """Fresh copies of the set's prototypes: a group of `n_samples` per prompt, indices from 0."""
    return [
        [_copy(one, position, n) for n in range(one.n_samples)]
        for position in range(len(one.samples))
    ]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of `k` samples is right, given `num_right` of `num_samples`.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of "Evaluating Large Language Models Trained on
    Code" (arXiv:2107.03374, eq. 1), as the product of its stable form.

    Raises:
        ValueError: not 0 <= num_right <= num_samples, or not 1 <= k <= num_samples.
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_right} of them right")
    if num_samples - num_right < k:
        return 1.0
    all_wrong = 1.0
    for i in range(num_samples - num_right + 1, num_samples + 1):
        all_wrong *= 1.0 - k / i
    return 1.0 - all_wrong


def _copy(one: EvalSet, position: int, n: int) -> Sample:
    sample = copy.deepcopy(one.samples[position])
    sample.group_index, sample.index = position, position * one.n_samples + n
    sample.metadata = {**sample.metadata, **one.metadata}
    if one.rm_type is not None:
        sample.metadata["rm_type"] = one.rm_type
    if one.custom_rm_path is not None:
        sample.custom_rm_path = one.custom_rm_path
    if sample.generate_function_path is None:
        sample.generate_function_path = one.custom_generate_function_path
    return sample


async def _answer(runner: GroupRunner, one: EvalSet, group: Group, seed: int) -> Group:
    try:
        return await runner.run(group, one.sampling, seed, one.name)
    except DovetailError:
        raise
    # One flaky tool must not end a long run; the sample counts as wrong, and as failed.
    except Exception as error:
        log.warning(
            "evaluation set %s: prompt %s failed", one.name, group[0].group_index, exc_info=error
        )
        for sample in group:
            _fail(sample, one.reward_key, error)
        return group


def _fail(sample: Sample, reward_key: str | None, error: Exception) -> None:
    sample.status = Sample.Status.FAILED
    sample.reward = {reward_key: 0.0} if reward_key else 0.0
    sample.metadata["generate_error"] = f"{type(error).__name__}: {error}"


def _set_metrics(one: EvalSet, groups: Sequence[Group], log_passrate: bool) -> dict[str, float]:
    samples = [sample for group in groups for sample in group]
    failed = sum(sample.status is Sample.Status.FAILED for sample in samples)
    if samples and failed == len(samples):
        raise RolloutError(
            f"every sample of the evaluation set {one.name} failed; the first: "
            f"{samples[0].metadata.get('generate_error')} (--custom-generate-function-path)"
        )
    rewards = [[reward_value(sample, one.reward_key) for sample in group] for group in groups]
    metrics = {
        "reward": mean(reward for group in rewards for reward in group),
        **shape_metrics(samples),
        "samples": float(len(samples)),
        "failed": float(failed),
    }
    if log_passrate and one.n_samples > 1:
        metrics |= pass_metrics(rewards)
    return {f"eval/{one.name}/{name}": value for name, value in metrics.items()}


def pass_metrics(rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """`pass@k` for k = 1, 2, 4, ... and the smallest group's size; right: a reward >= 1."""
    smallest = min((len(group) for group in rewards), default=0)
    powers = [2**i for i in range(smallest.bit_length()) if 2**i <= smallest]
    return {
        f"pass@{k}": mean(
            pass_at_k(len(group), sum(reward >= 1.0 for reward in group), k) for group in rewards
        )
        for k in sorted({*powers, smallest} - {0})
    }
