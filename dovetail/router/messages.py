"""Chat messages as protocols write them, and as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dovetail.router.fields import RequestError, shown

_TEXTS = ("text", "input_text", "output_text", "refusal")


def flatten_content(content: Any) -> str:
    """The text of a message's content: a text, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    texts = []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, Mapping) and "content" in part:
            texts.append(flatten_content(part["content"]))
    return "\n".join(texts)


def as_said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of Chat Completions with its content as one text, and without what is null.

    Raises:
        ValueError: it has a part that is no text.
    """
    content = message.get("content")
    for part in content if isinstance(content, list) else (content,):
        if not isinstance(part, Mapping | str | None):
            raise ValueError(f"got {type(part).__name__}, expected text or a list of its parts")
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        if kind not in _TEXTS:
            raise ValueError(f"{kind} parts are not taken: the policy reads text")
        if isinstance(part, Mapping) and not isinstance(part.get("text", ""), str):
            raise ValueError(f"got {shown(part['text'])} as the text of a part, expected text")
    made = {name: value for name, value in message.items() if value is not None}
    made["content"] = flatten_content(content)
    # The name that OpenAI gave the system's role later on.
    made["role"] = "system" if message.get("role") == "developer" else message.get("role")
    return made


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates read a call's arguments as an object, protocols write them as text."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def not_taken(model: str, messages: Any, error: Exception) -> RequestError:
    """The error for messages that the chat template objects to: it is the model's own program, and
    whatever it objects to is about them."""
    return RequestError(
        f"messages: the chat template of {model} does not take them: {error}",
        field="messages",
        got=shown(messages),
        expected="messages that the model's chat template takes",
    )


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            return dict(call)
    return {**call, "function": function}
