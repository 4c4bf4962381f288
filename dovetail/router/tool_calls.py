"""What a model wrote, taken apart: thoughts, text, and calls of tools."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_THOUGHT_END = "</think>"
_NUMBERS = {"integer": int, "number": float}


@dataclass
class ParsedModelOutput:
    """The parts of one response."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """`{"id", "type": "function", "function": {"name", "arguments": object}}`"""
    ill_formed: bool = False
    """A call was begun that can't be read; it stays in the text."""


def parse_model_output(
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> ParsedModelOutput:
    """Split a response.

    Calls are looked for if the request had tools: `<tool_call>` around JSON (Qwen, Hermes) or
    around `<function=...>` (Qwen coder), whatever `tool_parser` names. Thoughts are what stands
    before `</think>`, if `reasoning_parser` names any parser.
    """
    parsed, whole = ParsedModelOutput(), text
    if reasoning_parser and _THOUGHT_END in text:
        thought, _, text = text.partition(_THOUGHT_END)
        parsed.reasoning = thought.rpartition("<think>")[2].strip()
    if tools:
        text = _take_calls(text, tools, parsed)
    # Left as it is where nothing was taken out: spaces that a client does not send back make the
    # next prompt differ from what was sampled.
    parsed.text = text if text == whole else text.strip()
    return parsed


def tool_call_dict(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    """A call in the form of chat messages."""
    return {
        "id": call_id or f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def json_arguments(arguments: Any) -> str:
    """A call's arguments as the text that Chat Completions sends."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def sent_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as Chat Completions sends it: its arguments are text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json_arguments(function["arguments"])}}


def _take_calls(text: str, tools: Sequence[Mapping[str, Any]], parsed: ParsedModelOutput) -> str:
    kept, end = [], 0
    for found in _CALL.finditer(text):
        calls = _read(found[1], tools)
        if calls is None:
            parsed.ill_formed = True
            continue
        parsed.tool_calls += calls
        kept.append(text[end : found.start()])
        end = found.end()
    return "".join([*kept, text[end:]])


def _read(inside: str, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    functions = _FUNCTION.findall(inside)
    if functions:
        return [tool_call_dict(name, _parameters(name, body, tools)) for name, body in functions]
    try:
        call = json.loads(inside)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return [tool_call_dict(call["name"], arguments)]


def _parameters(name: str, body: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a call that is not JSON, by the types that the tool declares."""
    kinds: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            kinds = (function.get("parameters") or {}).get("properties") or {}
    return {key: _typed(value, kinds.get(key)) for key, value in _PARAMETER.findall(body)}


def _typed(value: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind in (None, "string"):
        return value
    try:
        return _NUMBERS[kind](value) if kind in _NUMBERS else json.loads(value)
    except ValueError:
        return value
