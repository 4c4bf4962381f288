"""TOML files: tables are sections, keys are leaves.

    [rollout]
    rollout_batch_size = 32

A leaf may also stand before the first table, since leaf names are unique. `[vllm]`, `[sglang]`,
`[megatron]` and `[router]` are handed through.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dovetail.config.aliases import ALIASES
from dovetail.config.incoming import Incoming, understood, unknown
from dovetail.config.leaves import Leaf, leaves, nearest, sections
from dovetail.config.passthrough import PREFIXES
from dovetail.types.errors import ConfigError

ORIGINS = "origins.json"
"""Beside the config.toml of a run: where each of its values comes from."""
_POSITION = re.compile(r" \(at line (\d+), column (\d+)\)$")
_NUMBERS = ("int", "float")


def read_toml(path: Path, into: Incoming) -> None:
    """Put every setting of a file into `into`.

    Raises:
        ConfigError: the file is missing or not TOML, a table or key is unknown or in the wrong
            table, a value has the wrong type; the message names file and line.
    """
    text = _read(path)
    tree = _parse(path, text)
    left_alone = _left_alone(path)
    for table, key, value in _settings(path, text, tree):
        where = _where(path, text, table, key)
        if not understood(key):
            raise unknown(key, key, where, style="key")
        _check_place(table, key, where)
        leaf = leaves().get(key)
        if leaf is not None:
            _check_type(leaf, value, where)
            if key in left_alone and key not in into.values and value == leaf.default:
                continue
        into.put(key, value, f"{path}:{f'{table}.' if table else ''}{key}")


def _left_alone(path: Path) -> set[str]:
    """Of a run directory's config.toml, which has every setting: those that nobody set. As settings
    of somebody's they would be looked at for having no effect."""
    try:
        origins = json.loads((path.parent / ORIGINS).read_bytes())
        return {leaf for leaf, origin in origins.items() if origin == "default"}
    except (OSError, ValueError, AttributeError):
        return set()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"run file {path} does not exist (looked from {Path.cwd()}); "
            "run files are TOML and come before all flags"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} can't be read: {error}") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        position = _POSITION.search(message)
        line = position.group(1) if position else str(text.count("\n") + 1)
        column = f", column {position.group(2)}" if position else ""
        reason = _POSITION.sub("", message)
        raise ConfigError(f"{path}:{line}{column}: not valid TOML: {reason}") from None


def _settings(path: Path, text: str, tree: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(table or "", key, value) of every setting; passthrough keys carry their prefix."""
    for name, value in tree.items():
        if name in sections() and isinstance(value, dict):
            yield from ((name, key, inner) for key, inner in value.items())
        elif name in PREFIXES and isinstance(value, dict):
            yield from (("", f"{name}_{key}", inner) for key, inner in value.items())
        elif isinstance(value, dict) and not understood(name):
            closest = nearest(name, [*sections(), *PREFIXES])
            hint = f"did you mean [{closest}]?" if closest else f"tables: {', '.join(sections())}"
            where = _where(path, text, "", name)
            raise ConfigError(f"{where}: unknown table [{name}]; {hint}")
        else:
            yield "", name, value


def _check_place(table: str, key: str, where: str) -> None:
    name = ALIASES[key].leaf if key in ALIASES else key
    leaf = leaves().get(name)
    if leaf is not None and table and leaf.section != table:
        raise ConfigError(
            f"{where}: {key} belongs in table [{leaf.section}], not in [{table}]; "
            f"move it there (TOML: {leaf.section}.{key})"
        )


def _check_type(leaf: Leaf, value: Any, where: str) -> None:
    """What pydantic would quietly turn into the right type: strings and booleans for numbers."""
    wrong = isinstance(value, bool) != (leaf.kind == "bool")
    if leaf.kind in _NUMBERS:
        wrong = wrong or isinstance(value, str)
    if wrong and leaf.kind in (*_NUMBERS, "bool"):
        raise ConfigError(
            f"{where}: {leaf.name} got {value!r}, expected {leaf.expected} "
            f"(flag: {leaf.flag}, TOML: {leaf.key})"
        )


def _where(path: Path, text: str, table: str, key: str) -> str:
    line = _line_of(text, table, key)
    return f"{path}:{line}" if line else str(path)


def _line_of(text: str, table: str, key: str) -> int | None:
    """The line that sets a key, if it is written plainly."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        if header:
            current = header.group(1)
            if current.split(".")[-1].strip("\"' ") == key or current == f"{table}.{key}":
                return number
            continue
        written = re.match(r"\s*[\"']?([\w\-.]+)[\"']?\s*=", line)
        if written and current in (table, key) and written.group(1) in (key, f"{table}.{key}"):
            return number
    return None
