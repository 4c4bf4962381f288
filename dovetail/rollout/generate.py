"""The default generate function: one sample in, the same sample with its response out."""

from __future__ import annotations

import dataclasses
import itertools

from dovetail.types import (
    DataError,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    Sample,
    SamplingParams,
)
from dovetail.types.media import Media
from dovetail.types.ports import Engine, Tokenizer
from dovetail.types.routed import extended

_request_numbers = itertools.count()
_FINISHED = (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)


def status_of(sample: Sample) -> Sample.Status:
    """The status, also where a plugin assigned its plain string."""
    status = sample.status
    return status if isinstance(status, Sample.Status) else Sample.Status(status)


async def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    sample: Sample,
    sampling: SamplingParams,
    *,
    max_context_len: int | None = None,
    mask_offpolicy: bool = False,
    return_routed_experts: bool = False,
) -> Sample:
    """Append the response of `sample`, or the rest of it when it was aborted before.

    A COMPLETED or TRUNCATED sample is returned as it is. `sampling.max_new_tokens` bounds the whole
    response, what is there already included; `max_context_len` bounds prompt plus response. With
    `mask_offpolicy` the tokens that are there already are not trained on. Afterwards the status is
    COMPLETED (a stop), TRUNCATED (a limit) or ABORTED.

    Raises:
        DataError: the sample has neither tokens nor a prompt, or images without their tensors.
        EngineError: the engine failed, or the request can never fit.
    """
    if status_of(sample) in _FINISHED:
        return sample
    if not sample.tokens:
        sample.tokens = _encode_prompt(tokenizer, sample)
    if mask_offpolicy and sample.response_length:
        sample.loss_mask = [0] * sample.response_length
    room = sampling.max_new_tokens - sample.response_length
    if max_context_len is not None:
        room = min(room, max_context_len - len(sample.tokens))
    if room <= 0:
        sample.status = Sample.Status.TRUNCATED
        return sample
    request = GenerateRequest(
        request_id=f"{sample.index}.{next(_request_numbers)}",
        prompt_ids=tuple(sample.tokens),
        sampling=_limited(sampling, room),
        num_generated=sample.response_length,
        media=Media.of(sample),
        return_routed_experts=return_routed_experts,
        session_id=sample.session_id or sample.routing_key,
    )
    append_result(tokenizer, sample, await engine.generate(request), sampling.skip_special_tokens)
    return sample


def _limited(sampling: SamplingParams, max_new_tokens: int) -> SamplingParams:
    if sampling.max_new_tokens == max_new_tokens:
        return sampling
    return dataclasses.replace(sampling, max_new_tokens=max_new_tokens)


def append_result(
    tokenizer: Tokenizer, sample: Sample, result: GenerateResult, skip_special_tokens: bool = False
) -> None:
    """Append what the engine generated, with logprobs, weight versions, counters and status."""
    resumed = sample.response_length > 0
    sample.append_response_tokens(
        tokens=result.token_ids,
        log_probs=result.logprobs,
        text=None if resumed else result.text,
        meta_info={
            "finish_reason": {"type": FinishReason(result.finish_reason).value},
            "prompt_tokens": result.prompt_tokens,
            "cached_tokens": result.cached_tokens,
            "completion_tokens": len(result.token_ids),
        },
    )
    if resumed and result.token_ids:
        # A character whose bytes lie on both sides of the seam only decodes from all tokens.
        response_ids = sample.tokens[-sample.response_length :]
        sample.response = tokenizer.decode(response_ids, skip_special_tokens=skip_special_tokens)
    sample.weight_versions += [str(span.weight_version) for span in result.version_spans]
    sample.rollout_routed_experts = extended(sample.rollout_routed_experts, result.routed_experts)


def _encode_prompt(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    if isinstance(sample.prompt, str) and sample.prompt:
        return list(tokenizer.encode(sample.prompt))
    if sample.prompt:
        return list(
            tokenizer.apply_chat_template(
                sample.prompt,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
                tools=sample.metadata.get("tools"),
                **sample.apply_chat_template_kwargs,
            )
        )
    raise DataError(
        f"sample {sample.index} of group {sample.group_index} has neither tokens nor a prompt; a "
        "data source must set `prompt` or `tokens` (--input-key, TOML: data.input_key)"
    )
