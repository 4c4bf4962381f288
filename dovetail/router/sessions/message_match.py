"""Whether a message that a client sent back is the one that was recorded.

Clients write messages anew before they send them back: fields that say nothing come and go, and
some frameworks format the arguments of calls again. What only looks different is the same message;
what says something else is another history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]

_SAYING = ("role", "content", "reasoning_content", "tool_calls")
_NOTHING: tuple[Any, ...] = (None, "", [])


def strict(recorded: Message, sent: Message) -> bool:
    """Equal role, content, thoughts and calls; nothing is nothing, however it is written."""
    return all(_plain(recorded.get(name)) == _plain(sent.get(name)) for name in _SAYING)


def loose_tool_call(recorded: Message, sent: Message) -> bool:
    """As `strict`, but arguments of calls may be other JSON for the same object."""
    return all(_equal(recorded.get(name), sent.get(name)) for name in _SAYING)


def role_content_only(recorded: Message, sent: Message) -> bool:
    """Equal role and content: calls and thoughts may differ, so that other histories may be taken
    for the recorded one."""
    return all(_plain(recorded.get(name)) == _plain(sent.get(name)) for name in _SAYING[:2])


def _equal(recorded: Any, sent: Any) -> bool:
    return bool(_plain(recorded, loose=True) == _plain(sent, loose=True))


def _plain(value: Any, loose: bool = False) -> Any:
    if value in _NOTHING:
        return None
    if isinstance(value, list):
        return [_plain_call(one, loose) for one in value]
    return value


def _plain_call(call: Any, loose: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    # Streams number calls; no template reads that.
    plain = {name: value for name, value in call.items() if name != "index" and value is not None}
    function = plain.get("function")
    if loose and isinstance(function, Mapping):
        plain["function"] = {**function, "arguments": _object(function.get("arguments"))}
    return plain


def _object(arguments: Any) -> Any:
    """One spelling of each JSON object; what is none stays as it is."""
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
        return json.dumps(found, sort_keys=True)
    except (TypeError, ValueError):
        return arguments
