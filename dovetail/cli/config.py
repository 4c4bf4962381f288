"""`dovetail config show|check|diff|docs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from dovetail.cli.settings import asks_for_help, read_settings, show_plan, tell_notes
from dovetail.config.flags import split_files
from dovetail.config.leaves import nearest
from dovetail.run.validate import validate, validate_cluster, validate_launch
from dovetail.types.errors import UsageError

_HELP = """usage: dovetail config show  [RUN.toml ...] [--flag ...] [--only-set | --plan]
       dovetail config check [RUN.toml ...] [--flag ...]
       dovetail config diff  A B [--flag ...]
       dovetail config docs  [--write FILE]

  show    the resolved values as TOML, each with its origin; --only-set leaves defaults out;
          --plan shows who gets which devices instead, and the memory that each is expected to need
  check   whether the values can work together; nothing is started
  diff    what differs between two run files or run directories
  docs    the reference page of every setting

A run directory stands for the config.toml in it.
"""


def config(argv: list[str]) -> int:
    """Hand over to one of the four."""
    if not argv or argv[0] in ("-h", "--help") or asks_for_help(argv[1:]):
        sys.stdout.write(_HELP)
        return 0
    action = _ACTIONS.get(argv[0])
    if action is None:
        closest = nearest(argv[0], _ACTIONS)
        hint = f"did you mean {closest}?" if closest else f"expected {', '.join(_ACTIONS)}"
        raise UsageError(f"unknown action 'config {argv[0]}'; {hint}")
    return action(argv[1:])


def _show(argv: list[str]) -> int:
    from dovetail.config.show import to_toml

    resolved = read_settings([token for token in argv if token not in ("--only-set", "--plan")])
    if "--plan" in argv:
        if "--only-set" in argv:
            raise UsageError("config show got --plan and --only-set, which show different things")
        validate(resolved.config)
        return show_plan(resolved.config)
    sys.stdout.write(to_toml(resolved, only_set="--only-set" in argv))
    return 0


def _check(argv: list[str]) -> int:
    resolved = read_settings(argv)
    validate(resolved.config)
    validate_cluster(resolved.config)
    tell_notes(resolved, validate_launch(resolved.config, resolved.passthrough))
    sys.stdout.write("ok: these settings can work together\n")
    return 0


def _diff(argv: list[str]) -> int:
    from dovetail.config.show import diff

    files, flags = split_files(argv)
    if len(files) != 2:
        raise UsageError(
            f"config diff got {len(files)} files, expected 2: dovetail config diff A.toml B.toml"
        )
    left, right = (read_settings([file, *flags]) for file in files)
    lines = diff(left, right)
    sys.stdout.write("".join(f"{line}\n" for line in lines) or "no difference\n")
    return 0


def _docs(argv: list[str]) -> int:
    from dovetail.config.reference import markdown

    if not argv:
        sys.stdout.write(markdown())
        return 0
    if len(argv) != 2 or argv[0] != "--write":
        raise UsageError(f"config docs got {' '.join(argv)}, expected nothing or --write FILE")
    path = Path(argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(), encoding="utf-8")
    return 0


_ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "show": _show,
    "check": _check,
    "diff": _diff,
    "docs": _docs,
}
