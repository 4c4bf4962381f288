"""Size report: files, functions, nesting and parameters against the limits of the style guide.

Run as a program it prints the largest of each kind and every violation, and exits 1 on one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("dovetail", "examples", "benchmarks")
FILE_LINES, FUNCTION_LINES, NESTING, PARAMETERS = 400, 60, 3, 7
LONGER_FUNCTIONS = {"dovetail/run/train.py:train": 120}
"""The main loop may be longer than other functions: it is read as one page."""

_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measure:
    """One size of one place in the code, beside its limit."""

    kind: str
    place: str
    size: int
    limit: int


def _nesting(node: ast.AST, depth: int = 0) -> int:
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _SCOPES):
            continue
        is_elif = isinstance(child, ast.If) and isinstance(node, ast.If) and child in node.orelse
        inner = depth + (isinstance(child, _BLOCKS) and not is_elif)
        deepest = max(deepest, _nesting(child, inner))
    return deepest


def _parameters(function: Function) -> int:
    """Parameters without self/cls.

    Keyword-only ones of a constructor do not count: every call names them, which is what the
    dataclass that would otherwise be asked for is good for.
    """
    arguments = function.args
    positional = [a.arg for a in arguments.posonlyargs + arguments.args]
    own = len(positional) - (positional[:1] in (["self"], ["cls"]))
    return own + (0 if function.name == "__init__" else len(arguments.kwonlyargs))


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def measure_file(path: Path, name: str) -> Iterator[Measure]:
    """Every size in one file; `name` is how the report calls it."""
    text = path.read_text(encoding="utf-8")
    yield Measure("lines of a file", name, len(text.splitlines()), FILE_LINES)
    try:
        tree = ast.parse(text, filename=name)
    except SyntaxError as error:
        yield Measure("syntax errors", f"{name}:{error.lineno}", 1, 0)
        return
    for function in _functions(tree):
        place = f"{name}:{function.lineno} {function.name}"
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        limit = LONGER_FUNCTIONS.get(f"{name}:{function.name}", FUNCTION_LINES)
        yield Measure("lines of a function", place, lines, limit)
        yield Measure("nesting", place, _nesting(function), NESTING)
        yield Measure("parameters", place, _parameters(function), PARAMETERS)


def measure_tree(root: Path = ROOT) -> list[Measure]:
    """Every size of the package, the examples and the benchmarks."""
    paths = [path for folder in CODE for path in sorted((root / folder).rglob("*.py"))]
    return [m for path in paths for m in measure_file(path, path.relative_to(root).as_posix())]


def violations(measures: list[Measure]) -> list[str]:
    """One line for each size over its limit."""
    return [f"{m.place}: {m.kind} {m.size} > {m.limit}" for m in measures if m.size > m.limit]


def report(measures: list[Measure]) -> str:
    """Largest of each kind, then what is over its limit."""
    lines = []
    for kind in dict.fromkeys(m.kind for m in measures):
        largest = max((m for m in measures if m.kind == kind), key=lambda m: m.size)
        lines.append(f"{kind:>20}: largest {largest.size:>3} of {largest.limit} ({largest.place})")
    return "\n".join([*lines, *violations(measures)])


if __name__ == "__main__":
    found = measure_tree()
    print(report(found))
    sys.exit(1 if violations(found) else 0)
