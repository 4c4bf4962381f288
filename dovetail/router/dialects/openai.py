"""OpenAI's form as vLLM and SGLang serve it: POST /v1/completions and /v1/chat/completions.

Beside OpenAI's fields there are vLLM's: token ids, the prompt's logprobs, stop reasons. Of
completions `logprobs: 1` means the sampled tokens' alone, which is what training asks for; from 2
on, as in chat from `top_logprobs: 1` on, come the most probable ones too, at the cost of a look at
the whole sequence.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.answer import Answer
from dovetail.router.balancer.pick import session_key
from dovetail.router.bridge import Bridge
from dovetail.router.describe import described
from dovetail.router.dialects.openai_answers import Told, choice_of, usage_of
from dovetail.router.dialects.openai_scores import (
    most_alternatives,
    no_alternatives,
    prompt_logprobs_wanted,
    scored,
)
from dovetail.router.dialects.openai_shape import Job, Scored, Shape
from dovetail.router.fields import Fields, RequestError, is_ids, wrong
from dovetail.router.fields import Shape as FieldShape
from dovetail.router.messages import for_template, not_taken
from dovetail.router.respond import Json, events, merged, read, together, while_connected
from dovetail.router.tool_calls import read_tools
from dovetail.router.wanted import Wanted, check_answers, openai_wanted

_DEFAULT_TOKENS = 16
_MESSAGE = "a list of messages {'role': ..., 'content': ...}"
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
PROMPT = FieldShape(
    {"anyOf": [_TEXT, _IDS, {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1}]},
    sample=[1],
    required=True,
)
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
MESSAGES = FieldShape(
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": {
                "role": {"type": "string"},
                "content": {"type": ["string", "array", "null"], "items": _PART},
                "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
            },
            "required": ["role"],
        },
    },
    sample=[{"role": "user", "content": "hi"}],
    required=True,
)
_OBJECT = FieldShape({"type": ["object", "null"]})


@dataclass(frozen=True)
class _Asked:
    """A request, read."""

    jobs: list[Job]
    shape: Shape
    stream: bool


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of this dialect."""

    @described("Continue prompts, in OpenAI's form", read_completion)
    async def completions(request: Request) -> Response:
        asked = await read(request, lambda fields: read_completion(fields, bridge))
        return await _respond(request, bridge, asked)

    @described("Answer a conversation, in OpenAI's form", read_chat)
    async def chat_completions(request: Request) -> Response:
        asked = await read(request, lambda fields: read_chat(fields, bridge))
        return await _respond(request, bridge, asked)

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]


def read_completion(fields: Fields, bridge: Bridge) -> _Asked:
    """A request for completions.

    Raises:
        RequestError: a field is wrong, or nothing that the engine can do.
    """
    prompts = _prompts(fields, bridge)
    wanted = openai_wanted(fields, limit_names=("max_tokens",), limit=_DEFAULT_TOKENS)
    asked = most_alternatives(fields, "logprobs", bridge)
    fields.refuse("the engine does not repeat prompts", echo=False)
    fields.refuse("the engine fills nothing in", suffix=None)
    top = asked or 0
    shape = Shape(chat=False, logprobs=asked is not None, top=top if top > 1 else 0)
    return _asked(fields, bridge, prompts, wanted, shape)


def read_chat(fields: Fields, bridge: Bridge) -> _Asked:
    """A request for a chat completion.

    Raises:
        RequestError: a field is wrong, or nothing that the engine can do.
    """
    prompt, tools = chat_prompt(fields, bridge)
    wanted = openai_wanted(fields, limit_names=("max_completion_tokens", "max_tokens"), limit=None)
    logprobs = fields.flag("logprobs", False)
    top = most_alternatives(fields, "top_logprobs", bridge) or 0
    shape = Shape(
        chat=True,
        logprobs=logprobs,
        top=top if logprobs else 0,
        tools=tools,
        reasoning=fields.flag("separate_reasoning", False),
    )
    return _asked(fields, bridge, [prompt], wanted, shape)


def _asked(
    fields: Fields,
    bridge: Bridge,
    prompts: list[tuple[int, ...]],
    wanted: Wanted,
    shape: Shape,
) -> _Asked:
    rid = fields.text("request_id") or fields.text("rid") or bridge.new_rid()
    stream = fields.flag("stream", False)
    options = fields.table("stream_options")
    usage = options.flag("include_usage", False)
    options.ignore("continuous_usage_stats", "include_obfuscation")
    options.finish()
    shape = replace(
        shape,
        model=fields.text("model", bridge.model) or bridge.model,
        rid=rid,
        created=int(time.time()),
        usage=usage,
        prompts=len(prompts),
        ids_as_text=fields.flag("return_tokens_as_token_ids", False),
        prompt_top=prompt_logprobs_wanted(fields, bridge),
    )
    check_answers("n", len(prompts), wanted.choices)
    if stream:
        no_alternatives(fields, shape.top, shape.prompt_top)
    _ignore_rest(fields)
    jobs = [
        Job(prompt, wanted.choice(number), f"{rid}_{place * wanted.choices + number}")
        for place, prompt in enumerate(prompts)
        for number in range(wanted.choices)
    ]
    return _Asked(jobs, shape, stream)


async def _respond(request: Request, bridge: Bridge, asked: _Asked) -> Response:
    key, shape, jobs = session_key(request.headers.raw), asked.shape, asked.jobs
    if key is not None:
        jobs = [replace(job, wanted=replace(job.wanted, session_id=key)) for job in jobs]
    if asked.stream:
        return events(_chunks(bridge, jobs, shape))
    works = [_answered(bridge, job, shape) for job in jobs]
    answers = await while_connected(request, together(works))
    choices = [
        choice_of(index, answer, jobs[index], shape, bridge, score)
        for index, (answer, score) in enumerate(answers)
    ]
    body = shape.envelope(choices, chunk=False)
    if shape.chat:
        body["prompt_token_ids"] = list(jobs[0].prompt)
        body["prompt_logprobs"] = choices[0].pop("prompt_logprobs")
    made = [answer for answer, _ in answers]
    usage = usage_of(made, shape)
    return Json({**body, "usage": usage, "weight_version": str(made[0].weight_version)})


async def _answered(bridge: Bridge, job: Job, shape: Shape) -> tuple[Answer, Scored]:
    answer = await bridge.answer(job.prompt, job.wanted, job.rid)
    return answer, await scored(bridge, job, answer, shape)


async def _chunks(bridge: Bridge, jobs: list[Job], shape: Shape) -> AsyncIterator[dict[str, Any]]:
    """What is new, choice by choice."""
    told = [Told(job, shape, bridge) for job in jobs]
    streams = [bridge.stream(job.prompt, job.wanted, job.rid) for job in jobs]
    async for index, answer in merged(streams):
        for choice in told[index].more(index, answer):
            yield shape.envelope([choice], chunk=True)
    if shape.usage:
        usage = usage_of([one.answer for one in told], shape)
        yield {**shape.envelope([], chunk=True), "usage": usage}


def _ignore_rest(fields: Fields) -> None:
    fields.refuse("the engine does not constrain its output", response_format=None)
    fields.refuse("the engine has one set of weights", lora_path=None)
    # Token ids are always there; the rest has no effect on what is generated.
    fields.ignore("return_token_ids", "user", "metadata", "store", "parallel_tool_calls")
    fields.ignore("priority", "cache_salt", "extra_key", "service_tier", "safety_identifier")
    fields.ignore("stream_reasoning", "include_reasoning", "no_stop_trim", "prompt_cache_key")
    fields.finish()


def _prompts(fields: Fields, bridge: Bridge) -> list[tuple[int, ...]]:
    given = fields.raw("prompt", shape=PROMPT)
    several = given if isinstance(given, list) and not is_ids(given) else [given]
    check_answers("prompt", len(several), 1)
    prompts: list[tuple[int, ...]] = []
    for one in several:
        if isinstance(one, str) and one:
            prompts.append(tuple(bridge.tokenizer.encode(one)))
        elif is_ids(one) and one:
            prompts.append(tuple(one))
        else:
            raise wrong("prompt", given, "text, a list of token ids, or a list of either")
    return prompts


def chat_prompt(
    fields: Fields, bridge: Bridge, *, required: bool = True
) -> tuple[tuple[int, ...], tuple[dict[str, Any], ...]]:
    """The messages through the tokenizer's chat template, and the tools that are shown to it.

    Args:
        fields: the request.
        bridge: has the tokenizer.
        required: for the description; without messages there is no prompt.

    Raises:
        RequestError: they are malformed, or nothing that the template takes.
    """
    messages = fields.raw("messages", shape=replace(MESSAGES, required=required))
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, _MESSAGE)
    continues = fields.flag("continue_final_message", False)
    extra = fields.raw("chat_template_kwargs", {}, shape=_OBJECT)
    if not isinstance(extra, dict):
        raise wrong("chat_template_kwargs", extra, "an object")
    choice = fields.raw("tool_choice", "auto", shape=FieldShape({"enum": ["auto", "none", None]}))
    if choice not in ("auto", "none"):
        raise wrong("tool_choice", choice, "'auto' or 'none': no tool can be forced")
    tools = read_tools(fields)
    shown = tools if choice == "auto" else None
    settings = {
        "tools": shown,
        "chat_template": fields.text("chat_template"),
        "add_generation_prompt": fields.flag("add_generation_prompt", not continues),
        "continue_final_message": continues,
        "tokenize": True,
        "return_dict": False,
    }
    conversation = [_message(number, one) for number, one in enumerate(messages)]
    try:
        ids = tuple(bridge.tokenizer.apply_chat_template(conversation, **{**extra, **settings}))
    except RequestError:
        raise
    except Exception as error:
        raise not_taken(bridge.model, messages, error) from error
    return ids, tuple(shown or ())


def _message(number: int, message: Any) -> dict[str, Any]:
    """One message, its text parts joined, and calls as templates read them."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(f"messages[{number}]", message, "{'role': ..., 'content': ...}")
    calls = message.get("tool_calls")
    if calls is not None and not _are_calls(calls):
        raise wrong(f"messages[{number}].tool_calls", calls, "a list of {'function': {...}}")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if _is_text(part) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise wrong(f"messages[{number}].content", content, "text: this server takes text only")
        message = {**message, "content": "".join(map(str, texts))}
    elif content is not None and not isinstance(content, str):
        raise wrong(f"messages[{number}].content", content, "text, or a list of its parts")
    return for_template(message)


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function", {}), dict) for call in calls
    )


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text"
