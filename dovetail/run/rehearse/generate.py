"""Generate functions in front of an engine whose answers are written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from dovetail.hooks import BoundHook
from dovetail.rollout import session
from dovetail.rollout.generate import generate as built_in
from dovetail.rollout.sampling import rollout_sampling
from dovetail.run.rehearse.http import served
from dovetail.run.rehearse.samples import Watched, check_generated, prompts
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.tokenizers import tokenizer_of
from dovetail.run.rehearse.verdict import Fault
from dovetail.run.rehearse.world import WrittenEngine
from dovetail.types import GenerateCall, Sample, SamplingParams
from dovetail.types.calls import RUNNING_CALL

_TOKENS = 2048
"""Longest response: written answers are shorter, a function that goes on and on is not."""
_ANSWERS = (
    "Let me think step by step. The answer is \\boxed{{{label}}}.",
    "<think>It is {label}.</think><answer>{label}</answer>",
    "I do not know.",
)


def generate(hook: BoundHook, stage: Stage) -> None:
    """A fresh sample in training, one in evaluation, and one with room for few tokens. The function
    of ours that runs agents is tried out with the agent."""
    if hook.path in session.NAMES:
        return
    found, stage.made_up = prompts(stage.config, stage.missing)
    for number, sample in enumerate(found):
        sample.index = sample.group_index = number
    long = sampling_of(stage)
    cases = {
        "a sample in training": (found[0], long, False),
        "a sample in evaluation": (found[-1], long, True),
        "a response of at most 8 tokens": (
            found[0],
            dataclasses.replace(long, max_new_tokens=8),
            False,
        ),
    }
    with engine(stage, found) as made:
        for where, (sample, how, evaluation) in cases.items():
            call = call_of(stage, made, copy.deepcopy(sample), how, evaluation)
            got = stage.call(_called, hook, call)
            _check([got] if isinstance(got, Sample) else list(got), call, where, stage)


@contextmanager
def engine(stage: Stage, found: list[Sample]) -> Iterator[WrittenEngine]:
    """The stand-in engine, also behind HTTP where the user's code can ask there."""
    made = written(stage, found)
    with served(stage, made, made.tokenizer):
        yield made


def written(stage: Stage, found: list[Sample]) -> WrittenEngine:
    """The stand-in engine, whose answers have to do with the first prompt."""
    answers = [text.format(label=found[0].label) for text in _ANSWERS]
    return WrittenEngine(tokenizer_of(stage.config), answers)


def sampling_of(stage: Stage) -> SamplingParams:
    """The run's, with a seed, and room for no more than written answers take."""
    run = dataclasses.replace(rollout_sampling(stage.config.rollout), seed=1)
    return dataclasses.replace(run, max_new_tokens=min(_TOKENS, run.max_new_tokens))


async def _called(hook: BoundHook, call: GenerateCall) -> Sample | list[Sample]:
    # As the run does: other frameworks' state objects look for the call there.
    RUNNING_CALL.set(call)
    made: Sample | list[Sample] = await hook(call)
    return made


def call_of(
    stage: Stage, made: WrittenEngine, sample: Sample, sampling: SamplingParams, evaluation: bool
) -> GenerateCall:
    """What a generate function is called with."""
    tokenizer = tokenizer_of(stage.config)

    async def default(one: Sample, how: SamplingParams) -> Sample:
        return await built_in(made, tokenizer, one, how)

    return GenerateCall(
        sample=sample,
        sampling=sampling,
        engine=made,
        tokenizer=tokenizer,
        default=default,
        evaluation=evaluation,
        args=stage.args,
    )


def _check(made: list[Sample], call: GenerateCall, where: str, stage: Stage) -> None:
    if not made:
        raise Fault(f"{where}: gives back an empty list")
    for sample in made:
        missing = isinstance(sample.metadata, Watched) and stage.made_up and stage.missing
        if missing and not sample.response_length:
            stage.warn(f"looked for {', '.join(stage.missing)}, which made-up samples do not have")
    needs = needs_logprobs(stage) and not call.evaluation
    for odd in check_generated(made, where, needs_logprobs=needs):
        stage.warn(odd)


def needs_logprobs(stage: Stage) -> bool:
    """Whether the run's training reads the engine's logprobs."""
    names = ("use_tis", "use_rollout_logprobs", "get_mismatch_metrics")
    return any(getattr(stage.args, name, False) for name in names)
