"""`dovetail hooks [SLOT]`: the table of hooks, for a person."""

from __future__ import annotations

import sys
import textwrap

from dovetail.cli.settings import asks_for_help
from dovetail.hooks.spec import HookSpec
from dovetail.hooks.table import HOOKS, spec_of
from dovetail.types.errors import UsageError

_WIDTH = 100
_HELP = """usage: dovetail hooks          every slot, by the stage that calls it
       dovetail hooks SLOT     one slot: what it is called with, what it returns, an example

A slot takes a registered name, pkg.mod.attr, pkg.mod:attr or path/file.py:attr. FAMILY:path (e.g.
slime:pkg.fn) forces that family's call form.
"""


def hooks(argv: list[str]) -> int:
    """Print the table, or one row of it."""
    if asks_for_help(argv):
        sys.stdout.write(_HELP)
        return 0
    if len(argv) > 1:
        raise UsageError(f"hooks got {len(argv)} names, expected at most one: dovetail hooks SLOT")
    sys.stdout.write(_one(spec_of(_slot(argv[0]))) if argv else _table())
    return 0


def _slot(name: str) -> str:
    return name.removeprefix("--").replace("-", "_").removesuffix("_path")


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
    return "\n".join([*lines, "", "dovetail hooks SLOT says more about one.", ""])


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
            *(f"{name:>10}  {value}" for name, value in facts.items()),
            "",
            "accepted call forms:",
            *(f"  {label:<{width}}{signature}" for label, signature in forms),
            "",
            "example:",
            textwrap.indent(spec.example.rstrip(), "  "),
            "",
        ]
    )
