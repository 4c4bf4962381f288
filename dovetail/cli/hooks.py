"""`dovetail hooks list|show|new|check`: the stages that take a function of the user's."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable

from dovetail.cli.settings import asks_for_help
from dovetail.config.leaves import nearest
from dovetail.hooks.spec import FAMILIES, HookSpec
from dovetail.hooks.table import HOOKS, spec_of
from dovetail.types.errors import HookError, UsageError

_WIDTH = 100
_HELP = f"""usage: dovetail hooks list
       dovetail hooks show  NAME
       dovetail hooks new   NAME [--form {"|".join(FAMILIES)}] [FILE]
       dovetail hooks check [RUN.toml ...] [--flag ...]

  list    every hook, by the stage that calls it
  show    one hook: when it is called and with what, what it returns, an example
  new     write a commented file to start from (default: NAME.py); nothing is overwritten
  check   load the hooks that files and flags name, call them with small inputs, and say what is
          wrong with them; needs no model. The first rows of --prompt-data are the inputs when it
          is given. Exit code 1 when a hook fails.

NAME is the flag without dashes and _path, e.g. custom_rm. A hook is given as a registered name,
pkg.mod.attr, pkg.mod:attr or path/file.py:attr. FAMILY:path (e.g. slime:pkg.fn) forces that
family's call form.
"""


def hooks(argv: list[str]) -> int:
    """Hand over to one of the four; a bare name is shown."""
    if not argv:
        return _list([])
    if argv[0] in ("-h", "--help") or (argv[0] in _ACTIONS and asks_for_help(argv[1:])):
        sys.stdout.write(_HELP)
        return 0
    action = _ACTIONS.get(argv[0])
    return _show(argv) if action is None else action(argv[1:])


def find(name: str) -> HookSpec:
    """The row of a slot, a leaf or a flag.

    Raises:
        UsageError: there is none; the message has the nearest, actions included.
    """
    bare = name.removeprefix("--").replace("-", "_")
    for spec in HOOKS:
        if bare in (spec.slot, spec.leaf):
            return spec
    try:
        return spec_of(bare.removesuffix("_paths").removesuffix("_path"))
    except HookError as error:
        closest = nearest(name, _ACTIONS)
        hint = f"did you mean 'hooks {closest}'? " if closest else ""
        raise UsageError(f"{hint}{error}") from None


def _list(argv: list[str]) -> int:
    if argv:
        raise UsageError(f"hooks list got {' '.join(argv)}, expected nothing")
    sys.stdout.write(_table())
    return 0


def _show(argv: list[str]) -> int:
    if len(argv) != 1:
        raise UsageError(
            f"hooks show got {len(argv)} names, expected one: dovetail hooks show NAME"
        )
    sys.stdout.write(_one(find(argv[0])))
    return 0


def _new(argv: list[str]) -> int:
    from dovetail.cli.hooks_new import new

    return new(argv)


def _check(argv: list[str]) -> int:
    from dovetail.cli.hooks_check import check

    return check(argv)


_ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "new": _new,
    "check": _check,
}


def _table() -> str:
    width = max(len(spec.flag) for spec in HOOKS) + 2
    lines = []
    for stage in dict.fromkeys(spec.stage for spec in HOOKS):
        lines.append(f"{stage}:")
        for spec in HOOKS:
            if spec.stage == stage:
                indent = " " * (width + 2)
                text = textwrap.wrap(
                    spec.summary, _WIDTH, initial_indent=indent, subsequent_indent=indent
                )
                text[0] = f"  {spec.flag:<{width}}" + text[0][len(indent) :]
                lines += text
    return "\n".join([*lines, "", "dovetail hooks show NAME says more about one.", ""])


def _one(spec: HookSpec) -> str:
    forms = [(form.label, form.signature) for form in spec.forms]
    width = max(len(label) for label, _ in forms) + 2
    facts = {
        "called": spec.when,
        "by": f"{spec.stage}, in the {spec.process} process",
        "returns": spec.returns,
        "default": spec.default,
    }
    if spec.registered:
        facts["by name"] = ", ".join(spec.registered)
    return "\n".join(
        [
            f"{spec.flag} (TOML: {spec.key})",
            spec.summary,
            "",
            *textwrap.wrap(spec.doc, _WIDTH),
            "",
            *(line for name, value in facts.items() for line in _fact(name, value)),
            "",
            "accepted call forms:",
            *(f"  {label:<{width}}{signature}" for label, signature in forms),
            "",
            "example:",
            textwrap.indent(spec.example.rstrip(), "  "),
            "",
        ]
    )


def _fact(name: str, value: str) -> list[str]:
    return textwrap.wrap(value, _WIDTH, initial_indent=f"{name:>10}  ", subsequent_indent=" " * 12)
