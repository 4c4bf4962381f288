"""Flags that a user's function brings along: its `add_arguments(parser)`, as in miles."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from dovetail.hooks.load import admit_foreign_imports, load, split_family
from dovetail.hooks.table import spec_of
from dovetail.types import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"on the command line: {message} (a flag of the user's function)")


def own_flags(paths: dict[str, str], foreign: bool = True) -> argparse.ArgumentParser | None:
    """A parser with the flags of functions; None when they have none.

    Args:
        paths: by the leaf that names the function.
        foreign: whether they may import what other frameworks are called.

    Raises:
        HookError: a function can't be loaded.
    """
    if foreign:
        admit_foreign_imports()
    specs = {path: spec_of(leaf.removesuffix("_path")) for leaf, path in paths.items()}
    targets = [load(spec, split_family(path)[1]) for path, spec in specs.items()]
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
