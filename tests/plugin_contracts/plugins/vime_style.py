"""Plugins as vime's guide shows them, where that differs from slime's."""

from vime.rollout.filter_hub.base_types import DynamicFilterOutput
from vime.utils.http_utils import post
from vime.utils.types import Sample


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


async def generate_by_http(args, sample, sampling_params):
    """Asks the server in vLLM's form."""
    url = f"http://{args.vllm_router_ip}:{args.vllm_router_port}/inference/v1/generate"
    sample.tokens = [ord(c) for c in sample.prompt]
    params = {"max_tokens": 4, "temperature": sampling_params["temperature"], "logprobs": 1}
    asked = {"model": args.hf_checkpoint, "token_ids": sample.tokens, "sampling_params": params}
    choice = (await post(url, asked))["choices"][0]
    ids = choice["token_ids"]
    logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
    sample.append_response_tokens(
        tokens=ids, log_probs=logprobs, text="".join(chr(token) for token in ids)
    )
    ended = choice["finish_reason"] == "stop"
    sample.status = Sample.Status.COMPLETED if ended else Sample.Status.TRUNCATED
    return sample


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
