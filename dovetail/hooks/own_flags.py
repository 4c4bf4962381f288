"""Flags that a user's function brings along: its `add_arguments(parser)`, as in miles."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from dovetail.hooks.load import load, split_family
from dovetail.hooks.table import spec_of
from dovetail.types import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"on the command line: {message} (a flag of the user's function)")


def own_flags(paths: list[str]) -> argparse.ArgumentParser | None:
    """A parser with the flags of the functions at `paths`; None when they have none.

    Raises:
        HookError: a function can't be loaded.
    """
    spec = spec_of("custom_generate_function")
    targets = [load(spec, split_family(path)[1]) for path in dict.fromkeys(paths)]
    adding = [target for target in targets if hasattr(target, "add_arguments")]
    if not adding:
        return None
    parser = _parser()
    for target in adding:
        target.add_arguments(parser)
    return parser


def own_defaults(target: Any) -> dict[str, Any]:
    """What a function's own flags are when nobody gives them."""
    if not hasattr(target, "add_arguments"):
        return {}
    parser = _parser()
    target.add_arguments(parser)
    optional = [action for action in parser._actions if not action.required]
    return {action.dest: parser.get_default(action.dest) for action in optional} | parser._defaults


def _parser() -> _Parser:
    return _Parser(
        add_help=False, allow_abbrev=False, argument_default=None, conflict_handler="resolve"
    )
