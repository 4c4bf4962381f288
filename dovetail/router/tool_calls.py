"""The tools of a request, and what a model wrote, taken apart: thoughts, text, calls of tools."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.router.fields import Fields, Shape, is_objects

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_THOUGHT_END = "</think>"
_NUMBERS = {"integer": int, "number": float}
_OBJECT = {"type": ["object", "null"]}
_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "parameters": {**_OBJECT, "properties": {"properties": _OBJECT}},
    },
    "required": ["name"],
}
_TOOL = {"type": "object", "properties": {"function": _FUNCTION_SCHEMA}, "required": ["function"]}
_TOOLS = Shape(
    {"type": ["array", "null"], "items": {"anyOf": [_TOOL, _FUNCTION_SCHEMA]}},
)


@dataclass
class ParsedModelOutput:
    """The parts of one response."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """`{"id", "type": "function", "function": {"name", "arguments": object}}`"""
    ill_formed: bool = False
    """A call was begun that can't be read; it stays in the text."""


def read_tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The tools of a request: each `{"type": "function", "function": {...}}`, or the function
    alone.

    Raises:
        RequestError: one has no name, or parameters that are no object.
    """
    tools: list[dict[str, Any]] | None = fields.raw("tools", shape=_TOOLS)
    if tools is not None and not is_objects(tools):
        raise fields.wrong("tools", tools, "a list of objects")
    for number, tool in enumerate(tools or ()):
        _check_tool(fields, f"tools[{number}]", tool)
    return tools


def _check_tool(fields: Fields, place: str, tool: dict[str, Any]) -> None:
    function = tool
    if "function" in tool:
        place, function = f"{place}.function", tool["function"]
    if not isinstance(function, dict):
        raise fields.wrong(place, function, "an object {'name': ..., 'parameters': ...}")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise fields.wrong(f"{place}.name", name, "the function's name, as text")
    if not isinstance(parameters, dict | None):
        raise fields.wrong(f"{place}.parameters", parameters, "a JSON schema: an object")
    properties = None if parameters is None else parameters.get("properties")
    if not isinstance(properties, dict | None):
        raise fields.wrong(f"{place}.parameters.properties", properties, "an object")


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
    # Models write a thousand brackets now and then.
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return [tool_call_dict(call["name"], arguments)]


def _parameters(name: str, body: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values of a call that is not JSON, by the types that the tool declares."""
    kinds: Mapping[str, Any] = {}
    for tool in tools:
        function = _object(tool.get("function", tool))
        if function.get("name") == name:
            kinds = _object(_object(function.get("parameters")).get("properties"))
    return {key: _typed(value, kinds.get(key)) for key, value in _PARAMETER.findall(body)}


def _object(value: Any) -> Mapping[str, Any]:
    """Tools may come unread, from a user's function."""
    return value if isinstance(value, Mapping) else {}


def _typed(value: str, schema: Any) -> Any:
    kind = _object(schema).get("type")
    if kind in (None, "string"):
        return value
    try:
        made = _NUMBERS.get(kind) if isinstance(kind, str) else None
        return made(value) if made else json.loads(value)
    except (ValueError, RecursionError):
        return value
