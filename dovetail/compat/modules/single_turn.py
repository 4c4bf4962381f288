"""One turn of a sample over HTTP: prompt and response so far in, the rest of the response out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from dovetail.compat.modules.http import post
from dovetail.compat.modules.processing import (
    build_processor_kwargs,
    encode_image_for_rollout_engine,
)
from dovetail.compat.modules.wire import (
    VLLM,
    headers_of,
    in_sglang_shape,
    request_body,
    server_of,
)
from dovetail.observe.trace import trace_span
from dovetail.types import HookRunError, Sample
from dovetail.types.family import GenerateFnInput, GenerateFnOutput


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """miles' built-in generate function."""
    return GenerateFnOutput(await answer(input.state, input.sample, input.sampling_params))


async def answer(
    state: Any,
    sample: Sample,
    sampling_params: dict[str, Any],
    *,
    ask: Callable[..., Awaitable[Any]] = post,
) -> Sample:
    """Append what the server of `state.args` answers; `max_new_tokens` bounds the whole response.

    Raises:
        HookRunError: the sample is finished already, or there is no server to ask.
    """
    if Sample.Status(sample.status) not in (Sample.Status.PENDING, Sample.Status.ABORTED):
        raise HookRunError(f"sample {sample.index} is {sample.status}: nothing to generate")
    args = state.args
    prompt_ids = prepare_prompt_ids(sample, state.tokenizer, state.processor)
    room = sampling_params["max_new_tokens"] - sample.response_length
    if room <= 0:
        sample.status = Sample.Status.TRUNCATED
        return sample
    root, endpoint = server_of(args)
    body = request_body(args, endpoint, prompt_ids, {**sampling_params, "max_new_tokens": room})
    images = (sample.multimodal_inputs or {}).get("images")
    if images:
        _add_images(body, endpoint, sample, images)
    sample.tokens = sample.tokens or prompt_ids
    with trace_span(sample, "generate", attrs={"max_new_tokens": room}):
        given = await ask(f"{root}{endpoint}", body, headers=headers_of(args, sample))
    if endpoint == VLLM:
        given = in_sglang_shape(given, state.tokenizer)
    meta = given["meta_info"]
    pairs = meta.get("output_token_logprobs", [])
    sample.append_response_tokens(
        args,
        tokens=[pair[1] for pair in pairs],
        log_probs=[pair[0] for pair in pairs],
        meta_info=meta,
        text=given["text"],
    )
    return sample


def _add_images(body: dict[str, Any], endpoint: str, sample: Sample, images: list[Any]) -> None:
    if endpoint == VLLM:
        raise HookRunError(
            f"sample {sample.index} has images: they need an SGLang server (sglang_router_ip/port)"
        )
    # The server expands the placeholders of the text by its own rules.
    del body["input_ids"]
    body |= {
        "text": sample.prompt,
        "image_data": [encode_image_for_rollout_engine(image) for image in images],
    }


def prepare_prompt_ids(sample: Sample, tokenizer: Any, processor: Any) -> list[int]:
    """Prompt (and response so far) as ids; images go through the processor once."""
    media = any(value is not None for value in (sample.multimodal_inputs or {}).values())
    if sample.tokens and (sample.multimodal_train_inputs is not None or not media):
        return sample.tokens
    if processor is not None and media:
        made = processor(text=sample.prompt, **build_processor_kwargs(sample.multimodal_inputs))
        ids, mask = "input_ids", "attention_mask"
        if sample.multimodal_train_inputs is None:
            rest = {name: value for name, value in made.items() if name not in (ids, mask)}
            sample.multimodal_train_inputs = rest or None
        return _flat_ids(made[ids][0])
    if isinstance(sample.prompt, str):
        return _flat_ids(tokenizer.encode(sample.prompt, add_special_tokens=False))
    return _flat_ids(
        tokenizer.apply_chat_template(
            sample.prompt,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            tools=sample.metadata.get("tools"),
            **sample.apply_chat_template_kwargs,
        )
    )


def _flat_ids(ids: Any) -> list[int]:
    return [int(one) for one in (ids.tolist() if hasattr(ids, "tolist") else ids)]
