"""Answers of very different lengths, and their reward, written as one writes them for slime.

One sample in `args.tail_every` thinks: it may use `args.tail_tokens` tokens where the others have
four, as the few hard problems of a real data set do. A rollout that waits for all of its samples
waits for those.
"""

from slime.rollout.sglang_rollout import generate as slime_generate
from slime.utils.types import Sample


async def generate(args, sample: Sample, sampling_params) -> Sample:
    """slime's own generate function, with more room for some samples."""
    if sample.index % args.tail_every == 0:
        params = {**sampling_params, "max_new_tokens": args.tail_tokens, "ignore_eos": True}
        sample.metadata["thinks"] = True
    else:
        params = {**sampling_params, "max_new_tokens": 4}
    return await slime_generate(args, sample, params)


async def reward(args, sample: Sample, **kwargs) -> float:
    """The share of the sum's digits that the answer begins with: 1.0 when all are right."""
    pairs = zip(sample.response, sample.label, strict=False)
    return sum(said == right for said, right in pairs) / len(sample.label)
