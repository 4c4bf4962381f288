"""SGLang's form: POST /generate."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.answer import Answer
from dovetail.router.balancer.pick import session_key
from dovetail.router.bridge import Bridge
from dovetail.router.describe import described
from dovetail.router.dialects.sglang_scores import (
    Wish,
    prompt_entries,
    prompt_scores,
    response_entries,
    response_scores,
    wishes_of,
)
from dovetail.router.fields import Fields, RequestError, is_ids, wrong
from dovetail.router.fields import Shape as FieldShape
from dovetail.router.respond import (
    Json,
    events,
    merged,
    read,
    together,
    while_connected,
)
from dovetail.router.wanted import Wanted, check_answers, sglang_wanted
from dovetail.types import FinishReason, ScoreResult

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": ["string", "array", "null"], "minLength": 1, "items": {"type": "string"}}
_TEXT = FieldShape({**_TEXTS, "description": "The prompt, or several; or else input_ids."})
_INPUT_IDS = FieldShape(
    {
        "anyOf": [_IDS, {"type": "array", "items": _IDS, "minItems": 1}, {"type": "null"}],
        "description": "The prompt's token ids, or those of several; or else text.",
    },
    sample=[1],
)
_RID = FieldShape({"type": ["string", "array", "null"], "items": {"type": "string"}})


@dataclass(frozen=True)
class _Job:
    """One response to make."""

    prompt: tuple[int, ...]
    wanted: Wanted
    rid: str
    wish: Wish


@dataclass(frozen=True)
class _Shape:
    """What the answers hold."""

    token_text: bool
    routed_experts: bool
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class _Asked:
    """A request, read."""

    jobs: list[_Job]
    shape: _Shape
    stream: bool
    many: bool
    """The answer is a list."""


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of this dialect."""

    @described("Continue prompts, in SGLang's form", _read)
    async def generate(request: Request) -> Response:
        asked = await read(request, lambda fields: _read(fields, bridge))
        jobs, key = asked.jobs, session_key(request.headers.raw)
        if key is not None:
            jobs = [replace(job, wanted=replace(job.wanted, session_id=key)) for job in jobs]
        if asked.stream:
            return events(_chunks(bridge, jobs, asked.shape, asked.many))
        works = [_answered(bridge, job, asked.shape) for job in jobs]
        bodies = await while_connected(request, together(works))
        return Json(bodies if asked.many else bodies[0])

    return [Route("/generate", generate, methods=["POST", "PUT"])]


def _read(fields: Fields, bridge: Bridge) -> _Asked:
    prompts, batched = _prompts(fields, bridge)
    stream = fields.flag("stream", False)
    wishes = wishes_of(fields, prompts, can_score=bridge.can_score, stream=stream)
    jobs = _jobs(fields, bridge, prompts, wishes)
    shape = _shape(fields, bridge)
    _refuse_rest(fields)
    return _Asked(jobs, shape, stream, batched or len(jobs) > 1)


async def _answered(bridge: Bridge, job: _Job, shape: _Shape) -> dict[str, Any]:
    before = await prompt_scores(bridge, job.prompt, job.wish)
    answer = await bridge.answer(job.prompt, job.wanted, job.rid)
    after = await response_scores(bridge, job.prompt, job.wanted, answer, job.wish)
    return _body(answer, job, shape, before, after)


async def _chunks(
    bridge: Bridge, jobs: list[_Job], shape: _Shape, many: bool
) -> AsyncIterator[dict[str, Any]]:
    scores = await together([prompt_scores(bridge, job.prompt, job.wish) for job in jobs])
    streams = [bridge.stream(job.prompt, job.wanted, job.rid) for job in jobs]
    async for number, answer in merged(streams):
        body = _body(answer, jobs[number], shape, scores[number])
        yield {**body, "index": number} if many else body


def _prompts(fields: Fields, bridge: Bridge) -> tuple[list[tuple[int, ...]], bool]:
    """The prompts as ids, and whether they came as a list."""
    text, ids = fields.raw("text", shape=_TEXT), fields.raw("input_ids", shape=_INPUT_IDS)
    if (text is None) == (ids is None):
        got = "neither" if text is None else "both"
        raise RequestError(
            f"input_ids: got {got} text and input_ids, expected exactly one of them",
            field="input_ids",
            got=got,
            expected="exactly one of text and input_ids",
        )
    if text is not None:
        texts = [text] if isinstance(text, str) else text
        check_answers("text", len(texts) if isinstance(texts, list) else 1, 1)
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise wrong("text", text, "a string or a list of strings")
        prompts = [tuple(bridge.tokenizer.encode(one)) for one in texts]
    else:
        nested = isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)
        several = ids if nested else [ids]
        check_answers("input_ids", len(several), 1)
        if not all(is_ids(one) for one in several):
            raise wrong("input_ids", ids, "a list of token ids, or a list of such lists")
        prompts = [tuple(one) for one in several]
    if not prompts or not all(prompts):
        raise wrong("text" if ids is None else "input_ids", text or ids, "one token or more")
    return prompts, isinstance(text, list) or (ids is not None and isinstance(ids[0], list))


def _jobs(
    fields: Fields, bridge: Bridge, prompts: list[tuple[int, ...]], wishes: list[Wish]
) -> list[_Job]:
    """One job per prompt and choice; choices of one prompt stand side by side."""
    several = fields.tables("sampling_params", len(prompts))
    rids = fields.raw("rid", shape=_RID)
    if isinstance(rids, str):
        # One name for a whole batch: its members are named after it.
        rids = [rids] if len(prompts) == 1 else [f"{rids}_{i}" for i in range(len(prompts))]
    rids = [bridge.new_rid() for _ in prompts] if rids is None else rids
    if not isinstance(rids, list) or not all(isinstance(one, str) for one in rids):
        raise wrong("rid", rids, "a string, or a list of one per prompt")
    if len(rids) != len(prompts):
        raise wrong("rid", rids, f"one for each of the {len(prompts)} prompts")
    jobs: list[_Job] = []
    routed_experts = fields.flag("return_routed_experts", False)
    for prompt, params, rid, wish in zip(prompts, several, rids, wishes, strict=True):
        wanted = sglang_wanted(params)
        check_answers("sampling_params.n", len(prompts), wanted.choices)
        if routed_experts:
            wanted = replace(wanted, routed_experts=True)
        for number in range(wanted.choices):
            name = rid if wanted.choices == 1 else f"{rid}_{number}"
            jobs.append(_Job(prompt, wanted.choice(number), name, wish))
    return jobs


def _shape(fields: Fields, bridge: Bridge) -> _Shape:
    return _Shape(
        fields.flag("return_text_in_logprobs", False),
        fields.flag("return_routed_experts", False),
        lambda ids: bridge.tokenizer.decode(ids, skip_special_tokens=False),
    )


def _refuse_rest(fields: Fields) -> None:
    """Everything else that SGLang's request may hold."""
    fields.refuse(
        "this server takes text only; let the generate function call the engine's own server for "
        "images",
        image_data=None,
        audio_data=None,
        video_data=None,
        modalities=None,
        input_embeds=None,
    )
    fields.refuse("the engine has one set of weights", lora_path=None, lora_id=None)
    fields.refuse("the engine gives no hidden states", return_hidden_states=False)
    fields.refuse(
        "the engine gives the sampled token's logprob only",
        token_ids_logprob=None,
        token_ids_logprob_positions=None,
        return_entropy=False,
        return_indexer_topk=False,
        custom_logit_processor=None,
    )
    fields.refuse("the server keeps no sessions", session_params=None)
    fields.refuse("the client waits for its answer", background=False)
    # About scheduling, logs and prefill servers: without an effect on what is generated.
    fields.ignore("extra_key", "priority", "log_metrics", "no_logs", "custom_labels", "model")
    fields.ignore("conversation_id", "data_parallel_rank", "routed_dp_rank", "return_bytes")
    fields.ignore("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key")
    fields.ignore("routed_experts_start_len", "routing_key", "require_reasoning", "stream_options")
    fields.finish()


def _body(
    answer: Answer,
    job: _Job,
    shape: _Shape,
    before: ScoreResult | None = None,
    after: ScoreResult | None = None,
) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": answer.rid,
        "finish_reason": _finish(answer),
        "prompt_tokens": answer.prompt_tokens,
        "weight_version": str(answer.weight_version),
        "weight_versions": [
            {"version": str(span.weight_version), "start": span.start, "end": span.end}
            for span in answer.spans
        ],
        "completion_tokens": len(answer.token_ids),
        "cached_tokens": answer.cached_tokens,
        "e2e_latency": answer.elapsed_s,
    }
    if job.wish.logprobs:
        decode = shape.decode if shape.token_text else None
        meta |= prompt_entries(job.prompt, job.wish, before, decode)
        meta |= response_entries(answer, job.wish, after, decode)
    # What was aborted before it ran has no experts, and needs none.
    if shape.routed_experts and answer.finish is not None and answer.token_ids:
        if answer.routed_experts is None:
            raise RequestError(
                "return_routed_experts: the engine gave none; this model has no experts, or the "
                "engine does not record their choice",
                field="return_routed_experts",
                got="True",
                expected="False",
            )
        packed = np.ascontiguousarray(answer.routed_experts, dtype=np.int32)
        meta["routed_experts"] = base64.b64encode(packed.tobytes()).decode()
        meta["routed_experts_start_len"] = 0
        meta["routed_experts_shape"] = list(packed.shape)
    return {"text": answer.text, "output_ids": list(answer.token_ids), "meta_info": meta}


def _finish(answer: Answer) -> dict[str, Any] | None:
    if answer.finish is None:
        return None
    if answer.finish is FinishReason.STOP:
        return {"type": "stop", "matched": answer.matched}
    if answer.finish is FinishReason.LENGTH:
        return {"type": "length", "length": len(answer.token_ids)}
    return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
