"""Resolved configurations as text: TOML with the origin of each value, and what differs between
two."""

from __future__ import annotations

import json
from typing import Any

from dovetail.config.leaves import leaves
from dovetail.config.resolve import Resolved


def value_of(resolved: Resolved, name: str) -> Any:
    """The value of a leaf."""
    leaf = leaves()[name]
    return getattr(getattr(resolved.config, leaf.section), name)


def to_toml(resolved: Resolved, *, origins: bool = True, only_set: bool = False) -> str:
    """The run as a TOML file that resolves to the same values.

    Args:
        resolved: what to write.
        origins: put where each value came from behind it, as a comment.
        only_set: leave out what nobody set.
    """
    lines: list[str] = []
    section = ""
    for name, leaf in leaves().items():
        origin = resolved.origins[name]
        if only_set and origin == "default":
            continue
        if leaf.section != section:
            section = leaf.section
            lines += ["", f"[{section}]"]
        value = value_of(resolved, name)
        unset = value is None
        text = f"# {name} is not set" if unset else f"{name} = {toml_value(value)}"
        lines.append(f"{text:<48}  # {origin}" if origins and not unset else text)
    if resolved.passthrough:
        # Keys that stand in no table come first in a TOML file.
        lines = [f"{k} = {toml_value(v)}" for k, v in resolved.passthrough.items()] + lines
    return "\n".join(lines).strip("\n") + "\n"


def toml_value(value: Any) -> str:
    """A JSON-like value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        items = ", ".join(
            f"{_text(str(key))} = {toml_value(inner)}"
            for key, inner in value.items()
            if inner is not None
        )
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(inner) for inner in value)}]"
    if isinstance(value, str):
        return _text(value)
    return repr(value) if isinstance(value, float) else str(value)


def _text(value: str) -> str:
    # JSON's escapes are TOML's, except surrogate pairs, which ensure_ascii would write.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def diff(left: Resolved, right: Resolved) -> list[str]:
    """`section.name: left -> right` for every value that differs, in reading order."""
    lines = []
    for name, leaf in leaves().items():
        a, b = value_of(left, name), value_of(right, name)
        if a != b:
            lines.append(f"{leaf.key}: {_short(a)} -> {_short(b)}")
    for name in sorted(left.passthrough.keys() | right.passthrough.keys()):
        a, b = left.passthrough.get(name), right.passthrough.get(name)
        if a != b:
            lines.append(f"{name}: {_short(a)} -> {_short(b)}")
    return lines


def _short(value: Any) -> str:
    return "(not set)" if value is None else toml_value(value)
