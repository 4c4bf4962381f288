"""Chat Completions: `POST /v1/chat/completions`, whole or as a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import web

from dovetail.compat.agent.adapters.common import (
    Asked,
    BaseAdapter,
    Reply,
    RequestRefused,
    json_arguments,
    read_body,
)
from dovetail.router.messages import as_said

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "stop": "stop",
    "seed": "sampling_seed",
}


class OpenAIAdapter(BaseAdapter):
    """Speaks OpenAI's Chat Completions."""

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """With and without /v1."""
        for prefix in ("/v1", ""):
            router.add_post(f"{prefix}/chat/completions", self._complete)
            router.add_get(f"{prefix}/models", self._models)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await read_body(request)
            asked = translate(body)
            reply = await self.answer(request, asked)
        except RequestRefused as refused:
            error = {"message": str(refused), "type": refused.kind, "code": refused.status}
            return web.json_response({"error": error}, status=refused.status)
        if not asked.stream:
            return web.json_response(_completion(reply, asked.model))
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for chunk in _chunks(reply, asked.model, with_usage):
            await stream.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await stream.write(b"data: [DONE]\n\n")
        return stream


def translate(body: Mapping[str, Any]) -> Asked:
    """A request's messages, tools and sampling."""
    sampling = {ours: body[name] for name, ours in _SAMPLING.items() if body.get(name) is not None}
    return Asked(
        messages=[_message(message) for message in body["messages"]],
        tools=body.get("tools") if body.get("tool_choice") != "none" else None,
        sampling=sampling,
        template_kwargs=dict(body.get("chat_template_kwargs") or {}),
        model=str(body.get("model") or "policy"),
        stream=bool(body.get("stream")),
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return as_said(message)
    except ValueError as error:
        raise RequestRefused(400, "invalid_request_error", str(error)) from error


def _wire_message(reply: Reply) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json_arguments(arguments)}}
        for call in reply.parsed.tool_calls
        for arguments in (call["function"]["arguments"],)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": reply.parsed.text or None}
    if reply.parsed.reasoning:
        message["reasoning_content"] = reply.parsed.reasoning
    if calls:
        message["tool_calls"] = calls
    else:
        message["content"] = reply.parsed.text
    return message


def _usage(reply: Reply) -> dict[str, int]:
    asked, made = len(reply.turn.prompt_ids), len(reply.turn.output_ids)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _completion(reply: Reply, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": 0, "message": _wire_message(reply), "finish_reason": reply.finish_reason}
        ],
        "usage": _usage(reply),
    }


def _chunks(reply: Reply, model: str, with_usage: bool) -> Iterator[dict[str, Any]]:
    whole = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }
    message = _wire_message(reply)
    calls = [{"index": i, **call} for i, call in enumerate(message.pop("tool_calls", []))]
    delta = {**message, "tool_calls": calls} if calls else message
    yield {**whole, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**whole, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]}
    if with_usage:
        yield {**whole, "choices": [], "usage": _usage(reply)}
