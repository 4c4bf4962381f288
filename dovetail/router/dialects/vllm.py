"""vLLM's own form: POST /inference/v1/generate, token ids in and token ids out."""

from __future__ import annotations

import base64
import io
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
from dovetail.router.dialects.openai_answers import logprobs_of, usage_of
from dovetail.router.dialects.openai_scores import (
    most_alternatives,
    prompt_entries,
    prompt_logprobs_wanted,
    scored,
)
from dovetail.router.dialects.openai_shape import Job, Scored, Shape
from dovetail.router.fields import Fields
from dovetail.router.respond import Json, read, together, while_connected
from dovetail.router.wanted import openai_wanted

_DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class _Asked:
    """A request, read."""

    jobs: list[Job]
    shape: Shape


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of this dialect."""

    @described("Continue token ids, in vLLM's form", _read)
    async def generate(request: Request) -> Response:
        asked = await read(request, lambda fields: _read(fields, bridge))
        key = session_key(request.headers.raw)
        works = [
            _answered(bridge, replace(job, wanted=replace(job.wanted, session_id=key)), asked.shape)
            for job in asked.jobs
        ]
        answers = await while_connected(request, together(works))
        return Json(_body(asked, answers, bridge))

    return [Route("/inference/v1/generate", generate, methods=["POST"])]


async def _answered(bridge: Bridge, job: Job, shape: Shape) -> tuple[Answer, Scored]:
    answer = await bridge.answer(job.prompt, job.wanted, job.rid)
    return answer, await scored(bridge, job, answer, shape)


def _read(fields: Fields, bridge: Bridge) -> _Asked:
    prompt = fields.ids("token_ids", required=True)
    params = fields.table("sampling_params")
    wanted = openai_wanted(params, limit_names=("max_tokens",), limit=_DEFAULT_TOKENS)
    # In vLLM a setting of the engine gives the experts with every answer.
    wanted = replace(wanted, routed_experts=bridge.routed_experts)
    asked = most_alternatives(params, "logprobs", bridge)
    prompt_top = prompt_logprobs_wanted(params, bridge)
    params.finish()
    rid = fields.text("request_id") or bridge.new_rid()
    shape = Shape(
        chat=True,
        logprobs=asked is not None,
        top=asked if asked is not None and asked > 1 else 0,
        model=fields.text("model", bridge.model) or bridge.model,
        rid=rid,
        ids_as_text=True,
        prompt_top=prompt_top,
    )
    _refuse_rest(fields)
    jobs = [Job(prompt, wanted.choice(i), f"{rid}_{i}") for i in range(wanted.choices)]
    return _Asked(jobs, shape)


def _refuse_rest(fields: Fields) -> None:
    fields.refuse("this server takes text only", features=None)
    fields.refuse("this form answers in one piece", stream=False)
    fields.refuse("the engine has one process", kv_transfer_params=None)
    fields.ignore("priority", "cache_salt", "stream_options")
    fields.finish()


def _body(asked: _Asked, made: list[tuple[Answer, Scored]], bridge: Bridge) -> dict[str, Any]:
    shape, (first, score) = asked.shape, made[0]
    answers = [answer for answer, _ in made]
    told = None
    if shape.prompt_top is not None:
        told = prompt_entries(asked.jobs[0], score.prompt, bridge)
    return {
        "request_id": shape.rid,
        "model": shape.model,
        "choices": [
            {
                "index": index,
                "token_ids": list(answer.token_ids),
                "logprobs": logprobs_of(answer, shape, bridge, one) if shape.logprobs else None,
                "finish_reason": None if answer.finish is None else answer.finish.value,
                "routed_experts": _routed_experts(answer),
            }
            for index, (answer, one) in enumerate(made)
        ],
        "usage": usage_of(answers, shape),
        "weight_version": str(first.weight_version),
        "prompt_logprobs": told,
        "kv_transfer_params": None,
    }


def _routed_experts(answer: Answer) -> str | None:
    """As an .npy file in base64."""
    if answer.routed_experts is None:
        return None
    file = io.BytesIO()
    np.save(file, np.asarray(answer.routed_experts, dtype=np.int32))
    return base64.b64encode(file.getvalue()).decode()
