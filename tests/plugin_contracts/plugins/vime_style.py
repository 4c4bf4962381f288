"""Plugins as vime's guide shows them, where that differs from slime's."""

from dovetail.types import DynamicFilterOutput, Sample


async def custom_generate(args, sample, sampling_params, evaluation=False):
    """Two samples out of one: a draft and its correction."""
    import copy

    draft, final = sample, copy.deepcopy(sample)
    for one, text in ((draft, "7?"), (final, "8")):
        one.tokens = [ord(c) for c in one.prompt]
        one.append_response_tokens(
            tokens=[ord(c) for c in text], log_probs=[-1.0] * len(text), text=text
        )
        one.status = Sample.Status.COMPLETED
        one.rollout_id = sample.index
    return [draft, final]


def filter_function(args, samples: list[Sample], **kwargs) -> DynamicFilterOutput:
    """Keeps everything."""
    return DynamicFilterOutput(keep=True, reason=None)


def buffer_filter(args, rollout_id, buffer: list[list[Sample]], num_samples: int):
    """The oldest groups."""
    taken, buffer[:] = buffer[:num_samples], buffer[num_samples:]
    return taken


def remove_wrong(args, samples: list[Sample]) -> None:
    """A sample filter over a flat list, as documented."""
    for sample in samples:
        if sample.reward == 0:
            sample.remove_sample = True


def process_all(args, samples: list[list[Sample]], data_source) -> None:
    """An all-samples process that wants the data source."""
    process_all.lengths = [len(group) for group in samples]


def postprocess(args, samples: list[list[Sample]]) -> None:
    """A data postprocess as documented."""
    for sample in (sample for group in samples for sample in group):
        sample.metadata["seen"] = True
