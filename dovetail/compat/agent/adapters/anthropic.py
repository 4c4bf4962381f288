"""Messages: `POST /v1/messages`, whole or as a stream, and the count of a prompt's tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from dovetail.compat.agent.adapters.common import (
    Asked,
    BaseAdapter,
    Reply,
    RequestRefused,
    flatten_content,
    read_body,
    tool_call_dict,
)

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_new_tokens",
    "stop_sequences": "stop",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicAdapter(BaseAdapter):
    """Speaks Anthropic's Messages."""

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """With and without /v1."""
        for prefix in ("/v1", ""):
            router.add_post(f"{prefix}/messages", self._messages)
            router.add_post(f"{prefix}/messages/count_tokens", self._count)

    async def _count(self, request: web.Request) -> web.Response:
        try:
            asked = translate(await read_body(request))
        except RequestRefused as refused:
            return _refusal(refused)
        return web.json_response({"input_tokens": len(self.render(asked))})

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = translate(await read_body(request))
            reply = await self.answer(request, asked)
        except RequestRefused as refused:
            return _refusal(refused)
        message = _wire_message(reply, asked.model)
        if not asked.stream:
            return web.json_response(message)
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for event in _events(message):
            data = json.dumps(event)
            await stream.write(f"event: {event['type']}\ndata: {data}\n\n".encode())
        return stream


def translate(body: Mapping[str, Any]) -> Asked:
    """A request's messages and tools as chat messages and functions, and its sampling."""
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": flatten_content(body["system"])})
    for message in body["messages"]:
        messages += _chat_messages(str(message.get("role")), message.get("content"))
    no_tools = (body.get("tool_choice") or {}).get("type") == "none"
    sampling = {ours: body[name] for name, ours in _SAMPLING.items() if body.get(name) is not None}
    return Asked(
        messages=messages,
        tools=None if no_tools else _functions(body.get("tools") or []),
        sampling=sampling,
        model=str(body.get("model") or "policy"),
        stream=bool(body.get("stream")),
    )


def _chat_messages(role: str, content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        return [{"role": role, "content": flatten_content(content)}]
    if role == "assistant":
        return [_assistant(content)]
    made: list[dict[str, Any]] = []
    text: list[Any] = []
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            result = flatten_content(block.get("content"))
            made.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result}
            )
        elif kind == "image":
            raise RequestRefused(
                400, "invalid_request_error", "images are not taken: the policy reads text"
            )
        else:
            text.append(block)
    # Results first: that is where the protocol has them, and templates want them after the calls.
    return [*made, {"role": role, "content": flatten_content(text)}] if text else made


def _assistant(content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": flatten_content([part for part in content if part.get("type") == "text"]),
    }
    thoughts = [part["thinking"] for part in content if part.get("type") == "thinking"]
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    calls = [
        tool_call_dict(part["name"], part.get("input") or {}, part.get("id"))
        for part in content
        if part.get("type") == "tool_use"
    ]
    return {**message, "tool_calls": calls} if calls else message


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    made = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool.get("description", ""),
                "parameters": tool.get("input_schema") or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
        if "name" in tool
    ]
    return made or None


def _wire_message(reply: Reply, model: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if reply.parsed.reasoning:
        content.append(
            {"type": "thinking", "thinking": reply.parsed.reasoning, "signature": "policy"}
        )
    if reply.parsed.text or not reply.parsed.tool_calls:
        content.append({"type": "text", "text": reply.parsed.text})
    for call in reply.parsed.tool_calls:
        function = call["function"]
        content.append(
            {
                "type": "tool_use",
                "id": call["id"],
                "name": function["name"],
                "input": function["arguments"],
            }
        )
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": _STOP_REASONS.get(reply.finish_reason, "end_turn"),
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(reply.turn.prompt_ids),
            "output_tokens": len(reply.turn.output_ids),
        },
    }


def _events(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    usage = message["usage"]
    opened = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 0}}
    yield {"type": "message_start", "message": opened}
    for index, block in enumerate(message["content"]):
        start, delta = _block_events(block)
        yield {"type": "content_block_start", "index": index, "content_block": start}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    produced = {"output_tokens": usage["output_tokens"]}
    yield {"type": "message_delta", "delta": ended, "usage": produced}
    yield {"type": "message_stop"}


def _block_events(block: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    kind = block["type"]
    if kind == "tool_use":
        delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        return {**block, "input": {}}, delta
    return {"type": kind, kind: ""}, {"type": f"{kind}_delta", kind: block[kind]}


def _refusal(refused: RequestRefused) -> web.Response:
    error = {"type": refused.kind, "message": str(refused)}
    return web.json_response({"type": "error", "error": error}, status=refused.status)
