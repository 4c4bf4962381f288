"""OpenAI's form as vLLM and SGLang serve it: POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.answer import Answer
from dovetail.router.bridge import Bridge
from dovetail.router.fields import Fields, RequestError, is_ids, wrong
from dovetail.router.respond import Json, events, fields_of, merged, together, while_connected
from dovetail.router.wanted import Wanted, openai_wanted, sampled_logprobs

_DEFAULT_TOKENS = 16
_MESSAGE = "a list of messages {'role': ..., 'content': ...}"


@dataclass(frozen=True)
class _Job:
    """One choice to make."""

    prompt: tuple[int, ...]
    wanted: Wanted
    rid: str


@dataclass(frozen=True)
class _Shape:
    """What the answers look like."""

    chat: bool
    model: str
    rid: str
    created: int
    logprobs: bool
    usage: bool
    prompts: int

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The outer object."""
        kind = "chat.completion" + ".chunk" * chunk if self.chat else "text_completion"
        return {
            "id": self.rid,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of this dialect."""

    async def completions(request: Request) -> Response:
        fields = await fields_of(request)
        prompts = _prompts(fields, bridge)
        wanted = openai_wanted(fields, limit_names=("max_tokens",), limit=_DEFAULT_TOKENS)
        logprobs = sampled_logprobs(fields, "logprobs", fields.raw("logprobs"))
        fields.refuse("the engine does not score prompts", echo=False)
        fields.refuse("the engine fills nothing in", suffix=None)
        return await _respond(request, bridge, fields, (prompts, wanted), logprobs, chat=False)

    async def chat_completions(request: Request) -> Response:
        fields = await fields_of(request)
        prompts = [chat_prompt(fields, bridge)]
        wanted = openai_wanted(
            fields, limit_names=("max_completion_tokens", "max_tokens"), limit=None
        )
        logprobs = fields.flag("logprobs", False)
        sampled_logprobs(fields, "top_logprobs", fields.raw("top_logprobs"))
        return await _respond(request, bridge, fields, (prompts, wanted), logprobs, chat=True)

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]


async def _respond(
    request: Request,
    bridge: Bridge,
    fields: Fields,
    task: tuple[list[tuple[int, ...]], Wanted],
    logprobs: bool,
    *,
    chat: bool,
) -> Response:
    prompts, wanted = task
    rid = fields.text("request_id") or fields.text("rid") or bridge.new_rid()
    stream = fields.flag("stream", False)
    options = fields.table("stream_options")
    shape = _Shape(
        chat=chat,
        model=fields.text("model", bridge.model) or bridge.model,
        rid=rid,
        created=int(time.time()),
        logprobs=logprobs,
        usage=options.flag("include_usage", False),
        prompts=len(prompts),
    )
    _ignore_rest(fields)
    jobs = [
        _Job(prompt, wanted.choice(number), f"{rid}_{place * wanted.choices + number}")
        for place, prompt in enumerate(prompts)
        for number in range(wanted.choices)
    ]
    if stream:
        return events(_chunks(bridge, jobs, shape))
    works = [bridge.answer(job.prompt, job.wanted, job.rid) for job in jobs]
    answers = await while_connected(request, together(works))
    choices = [
        _choice(index, answer, jobs[index].prompt, shape, bridge)
        for index, answer in enumerate(answers)
    ]
    body = shape.envelope(choices, chunk=False)
    if chat:
        body["prompt_token_ids"] = list(prompts[0])
    return Json({**body, "usage": _usage(answers, shape), **_version(answers)})


def _ignore_rest(fields: Fields) -> None:
    fields.refuse("the engine does not constrain its output", response_format=None)
    fields.refuse("the engine has one set of weights", lora_path=None)
    # Token ids are always there; the rest has no effect on what is generated.
    fields.ignore("return_token_ids", "return_tokens_as_token_ids", "user", "metadata", "store")
    fields.ignore("priority", "cache_salt", "extra_key", "service_tier", "parallel_tool_calls")
    fields.ignore("separate_reasoning", "stream_reasoning", "include_reasoning", "no_stop_trim")
    fields.finish()


def _prompts(fields: Fields, bridge: Bridge) -> list[tuple[int, ...]]:
    given = fields.raw("prompt")
    several = given if isinstance(given, list) and not is_ids(given) else [given]
    prompts: list[tuple[int, ...]] = []
    for one in several:
        if isinstance(one, str) and one:
            prompts.append(tuple(bridge.tokenizer.encode(one)))
        elif is_ids(one) and one:
            prompts.append(tuple(one))
        else:
            raise wrong("prompt", given, "text, a list of token ids, or a list of either")
    return prompts


def chat_prompt(fields: Fields, bridge: Bridge) -> tuple[int, ...]:
    """The messages through the tokenizer's chat template; tools are shown to it."""
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, _MESSAGE)
    continues = fields.flag("continue_final_message", False)
    extra = fields.raw("chat_template_kwargs", {})
    if not isinstance(extra, dict):
        raise wrong("chat_template_kwargs", extra, "an object")
    choice = fields.raw("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise wrong("tool_choice", choice, "'auto' or 'none': no tool can be forced")
    tools = fields.raw("tools")
    try:
        ids = bridge.tokenizer.apply_chat_template(
            [_message(number, one) for number, one in enumerate(messages)],
            tools=tools if choice == "auto" else None,
            chat_template=fields.text("chat_template"),
            add_generation_prompt=fields.flag("add_generation_prompt", not continues),
            continue_final_message=continues,
            tokenize=True,
            return_dict=False,
            **extra,
        )
    except RequestError:
        raise
    except Exception as error:
        # A template is the model's own program: whatever it objects to is about these messages.
        raise RequestError(
            f"messages: the chat template of {bridge.model} does not take them: {error}",
            field="messages",
            got=repr(messages)[:80],
            expected="messages that the model's chat template takes",
        ) from error
    return tuple(ids)


def _message(number: int, message: Any) -> dict[str, Any]:
    """One message, its text parts joined."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(f"messages[{number}]", message, "{'role': ..., 'content': ...}")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
    if kinds - {"text"}:
        raise wrong(f"messages[{number}].content", content, "text: this server takes text only")
    return {**message, "content": "".join(part.get("text", "") for part in content)}


async def _chunks(bridge: Bridge, jobs: list[_Job], shape: _Shape) -> AsyncIterator[dict[str, Any]]:
    """What is new, choice by choice."""
    told = [Answer(job.rid, len(job.prompt)) for job in jobs]
    streams = [bridge.stream(job.prompt, job.wanted, job.rid) for job in jobs]
    started: set[int] = set()
    async for index, answer in merged(streams):
        before = told[index]
        told[index] = answer
        here = len(before.token_ids)
        # A stop string may turn out to have begun in text that was told already.
        known = min(len(before.text), len(answer.text))
        new = replace(
            answer,
            text=answer.text[known:],
            token_ids=answer.token_ids[here:],
            logprobs=answer.logprobs[here:],
        )
        if answer.finish is None:
            told[index] = replace(answer, text=max(before.text, answer.text, key=len))
        choice = _choice(index, new, jobs[index].prompt, shape, bridge)
        if shape.chat:
            delta = choice.pop("message")
            choice["delta"] = delta if index not in started else {"content": delta["content"]}
        started.add(index)
        yield shape.envelope([choice], chunk=True)
    if shape.usage:
        yield {**shape.envelope([], chunk=True), "usage": _usage(told, shape)}


def _choice(
    index: int, answer: Answer, prompt: tuple[int, ...], shape: _Shape, bridge: Bridge
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "finish_reason": None if answer.finish is None else answer.finish.value,
        "stop_reason": answer.matched,
        "token_ids": list(answer.token_ids),
        "logprobs": None,
    }
    texts = [bridge.tokenizer.decode([token]) for token in answer.token_ids]
    if shape.chat:
        choice["message"] = {"role": "assistant", "content": answer.text}
        if shape.logprobs:
            choice["logprobs"] = {
                "content": [
                    {
                        "token": text,
                        "logprob": logprob,
                        "bytes": list(text.encode()),
                        "top_logprobs": [],
                    }
                    for text, logprob in zip(texts, answer.logprobs, strict=True)
                ]
            }
        return choice
    choice["text"] = answer.text
    choice["prompt_token_ids"] = list(prompt)
    if shape.logprobs:
        choice["logprobs"] = {
            "tokens": texts,
            "token_logprobs": list(answer.logprobs),
            "top_logprobs": None,
            "text_offset": _offsets(texts),
        }
    return choice


def _offsets(texts: list[str]) -> list[int]:
    offsets, here = [], 0
    for text in texts:
        offsets.append(here)
        here += len(text)
    return offsets


def _usage(answers: list[Answer], shape: _Shape) -> dict[str, Any]:
    # Choices of one prompt share it.
    each = len(answers) // shape.prompts
    prompt = sum(answer.prompt_tokens for answer in answers[::each])
    completion = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers)},
    }


def _version(answers: list[Answer]) -> dict[str, str]:
    return {"weight_version": str(answers[0].weight_version)}
