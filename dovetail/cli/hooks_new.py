"""`dovetail hooks new`: a file to start from."""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

from dovetail.cli.hooks import find
from dovetail.cli.skeletons import MILES, SLIME, VIME
from dovetail.hooks.spec import FAMILIES, HookSpec
from dovetail.types.errors import UsageError

_WIDTH = 96


def new(argv: list[str]) -> int:
    """Write a commented function of one hook and say how to use it.

    Raises:
        UsageError: no such hook or form, or the file is there already.
    """
    names, form = _read(argv)
    spec = find(names[0])
    path = Path(names[1] if len(names) > 1 else f"{spec.slot}.py")
    if path.suffix != ".py":
        raise UsageError(f"hooks new writes a Python file, got {path}; name it {path}.py")
    code = body(spec, form)
    if path.exists():
        raise UsageError(f"{path} is there already; hooks new overwrites nothing: name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    # "x": whoever wrote it meanwhile keeps theirs.
    with path.open("x", encoding="utf-8") as file:
        file.write(_head(spec, form) + code)
    where = f"{path}:{defined(code)}"
    sys.stdout.write(
        f"wrote {path}\n"
        f"try it:  dovetail hooks check {spec.flag} {where}\n"
        f"use it:  dovetail train ... {spec.flag} {where}\n"
        f"         or in the run file: [hooks] {_toml(spec, where)}\n"
    )
    return 0


def body(spec: HookSpec, form: str) -> str:
    """The code, in the form of one family.

    Raises:
        UsageError: that family has no form of its own for this hook.
    """
    if form == "native":
        return spec.example
    own = {"miles": MILES, "vime": VIME}.get(form, {})
    if spec.slot in own:
        return own[spec.slot]
    if spec.slot in SLIME:
        return SLIME[spec.slot].replace("from slime.", f"from {form}.")
    if any(form in one.families for one in spec.forms):
        return spec.example
    families = dict.fromkeys(family for one in spec.forms for family in one.families)
    raise UsageError(
        f"{spec.flag} has no form of {form}'s; it has {', '.join(families)}: --form native"
    )


def defined(code: str) -> str:
    """The name of the last function, class or value that code defines at its top level."""
    names = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.append(node.targets[0].id)
    return names[-1]


def _read(argv: list[str]) -> tuple[list[str], str]:
    names: list[str] = []
    form = "native"
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, has_value, value = token.partition("=")
        if name != "--form":
            names.append(token)
            continue
        form = value if has_value else (rest.pop(0) if rest else "")
        if form not in FAMILIES:
            raise UsageError(f"--form got {form!r}, expected one of {', '.join(FAMILIES)}")
    if not 1 <= len(names) <= 2:
        raise UsageError(
            f"hooks new got {len(names)} arguments, expected a hook and perhaps a file: "
            "dovetail hooks new custom_rm reward.py"
        )
    return names, form


def _head(spec: HookSpec, form: str) -> str:
    signatures = [one.signature for one in spec.forms if form in one.families]
    lines = [
        *textwrap.wrap(spec.summary, _WIDTH),
        "",
        *_wrapped("Called: ", spec.when),
        *_wrapped("Form: ", " or ".join(signatures)),
        *_wrapped("Gives back: ", spec.returns),
        *_wrapped("If there is none: ", spec.default),
        "",
        *textwrap.wrap(spec.doc, _WIDTH),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(label + text, _WIDTH, subsequent_indent="    ")


def _toml(spec: HookSpec, where: str) -> str:
    return f'{spec.leaf} = ["{where}"]' if spec.repeatable else f'{spec.leaf} = "{where}"'
