"""Flags, generated from the declarations: `--` + leaf name with dashes.

A small reader of our own instead of argparse, because foreign flags (engine owners', the slime
family's) must be recognised without being declared one by one, and an unknown flag has to be named
together with its nearest neighbour before anything else is complained about.

    --rollout-batch-size 32     a value; also --rollout-batch-size=32
    --partial-rollout           true; --no-partial-rollout is false
    --rollout-stop a b          a list: everything up to the next flag; --no-rollout-stop is empty
    --rollout-sample-hook-path  a list of functions: the flag may be repeated
    --no-eval-interval          unset
    --apply-chat-template-kwargs '{"enable_thinking": false}'     JSON
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from dovetail.config.aliases import ALIASES
from dovetail.config.incoming import Incoming, Strange, understood, unknown
from dovetail.config.leaves import Leaf, leaves
from dovetail.types.errors import ConfigError

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


OwnFlags = Callable[[dict[str, str], bool], argparse.ArgumentParser | None]
"""From the paths of the user's functions, by leaf, and whether they may import foreign names, to a
parser of the flags that they bring along."""
OWNERS_OF_FLAGS = (
    "rollout_function_path",
    "eval_function_path",
    "custom_generate_function_path",
    "custom_rm_path",
)


def split_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Run files (everything before the first flag) and flags."""
    first = next((i for i, token in enumerate(argv) if token.startswith("--")), len(argv))
    return list(argv[:first]), list(argv[first:])


def read_flags(tokens: Sequence[str], into: Incoming, own_flags: OwnFlags | None = None) -> None:
    """Put every flag of a command line into `into`.

    Unknown ones are offered to the user's functions, if any is named whose parser `own_flags`
    gives; what that reads goes into the leaf `plugin_args`.

    Raises:
        ConfigError: an unknown flag, a missing or surplus value, a value of the wrong form.
    """
    try:
        _read_all(tokens, into)
    except ConfigError:
        # Nobody who mistyped a flag's name wants to hear of its values first.
        _offer(into, own_flags)
        raise
    _offer(into, own_flags)


def _offer(into: Incoming, own_flags: OwnFlags | None) -> None:
    if not into.strange:
        return
    paths = {leaf: into.values[leaf] for leaf in OWNERS_OF_FLAGS if into.values.get(leaf)}
    foreign = into.values.get("compat_imports", True)
    parser = own_flags(paths, foreign) if own_flags is not None and paths else None
    if parser is None:
        raise into.strange[0].error
    known = set(parser._option_string_actions)
    for strange in into.strange:
        written = strange.tokens[0].partition("=")[0]
        if written not in known:
            raise _nearest_own(written, known) or strange.error
    given = parser.parse_args([token for strange in into.strange for token in strange.tokens])
    into.put("plugin_args", _plain(vars(given)), f"flag {into.strange[0].tokens[0]}")


def _nearest_own(written: str, known: set[str]) -> ConfigError | None:
    near = get_close_matches(written, known, n=1, cutoff=0.8)
    if not near:
        return None
    return ConfigError(
        f"on the command line: unknown flag {written}; did you mean {near[0]} (a flag of the "
        "user's function)?"
    )


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"on the command line: {name} became a {type(value).__name__}; a function's own "
                "flags must read plain values: numbers, strings, lists"
            ) from None
    return given


def _read_all(tokens: Sequence[str], into: Incoming) -> None:
    at = 0
    while at < len(tokens):
        if not tokens[at].startswith("--"):
            raise ConfigError(
                f"on the command line: unexpected '{tokens[at]}'; run files come before all flags, "
                "and a value follows its own flag"
            )
        end = at + 1
        while end < len(tokens) and not _is_flag(tokens[end]):
            end += 1
        taken = _read_one(tokens[at], tokens[at + 1 : end], into)
        at += 1 + taken


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


def _read_one(token: str, following: Sequence[str], into: Incoming) -> int:
    """Read one flag; how many of the following tokens it took."""
    written, has_value, inline = token.partition("=")
    name = written[2:].replace("-", "_")
    values = [inline] if has_value else list(following)
    origin = f"flag {written}"
    negated = leaves().get(name.removeprefix("no_")) if name.startswith("no_") else None
    if name not in leaves() and negated is not None:
        into.put(negated.name, _negated(negated, written, has_value), origin)
        return 0
    if not understood(name):
        error = unknown(name, written, "on the command line", style="flag")
        into.strange.append(Strange((token, *([] if has_value else values)), error))
        return 0 if has_value else len(values)
    leaf = leaves().get(name)
    if leaf is None:
        return _read_foreign(name, values, has_value, origin, into)
    value, taken = _typed(leaf, written, values, has_value)
    into.put(name, _added(leaf, value, into), origin)
    return taken


def _added(leaf: Leaf, value: Any, into: Incoming) -> Any:
    """With what the same flag gave before, where a flag may be repeated; files are replaced."""
    before = into.origins.get(leaf.name, "")
    if leaf.adds_up and before.startswith("flag "):
        return [*into.values[leaf.name], *value]
    return value


def _negated(leaf: Leaf, written: str, has_value: str) -> Any:
    if has_value or not leaf.can_be_negated:
        reason = "takes no value" if has_value else f"does not exist: {leaf.name} is always set"
        raise ConfigError(
            f"on the command line: {written} {reason}; use {leaf.flag} ({leaf.expected})"
        )
    return leaf.empty


def _read_foreign(name: str, values: list[str], has_value: str, origin: str, into: Incoming) -> int:
    alias = ALIASES.get(name)
    if alias is not None and not has_value and not alias.takes_value:
        into.put(name, True, origin)
        return 0
    plain: Any = True if not values else values[0] if len(values) == 1 else values
    own = leaves()[alias.leaf] if alias is not None else None
    if own is not None and own.is_list:
        plain = _added(own, values, into)
    if alias is not None and not alias.takes_value:
        plain = _truth(values[0], origin)
    into.put(name, plain, origin)
    return 0 if has_value else len(values)


def _typed(leaf: Leaf, written: str, values: list[str], has_value: str) -> tuple[Any, int]:
    if leaf.kind == "bool":
        return (_truth(values[0], written) if has_value else True), 0
    if leaf.is_list:
        return values, 0 if has_value else len(values)
    if not values:
        raise ConfigError(f"on the command line: {written} needs a value: {leaf.expected}")
    taken = 0 if has_value else 1
    return (_json(written, values[0]) if leaf.kind == "json" else values[0]), taken


def _truth(text: str, written: str) -> bool:
    if text.lower() not in _TRUTH:
        raise ConfigError(f"on the command line: {written} got '{text}', expected true or false")
    return _TRUTH[text.lower()]


def _json(written: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"on the command line: {written} got {text!r}, expected a JSON object like "
            f"'{{\"key\": 1}}' ({error})"
        ) from None
