"""`python -m dovetail.compat SCRIPT.py ...`, `-m MODULE ...`, `-c CODE ...`: run it under the
aliases. As with python itself, the rest of the line is the program's own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import FunctionType, ModuleType

from dovetail.compat.finder import aliases, install

_USAGE = """usage: python -m dovetail.compat SCRIPT.py [argument ...]
       python -m dovetail.compat -m MODULE [argument ...]
       python -m dovetail.compat -c CODE [argument ...]
       python -m dovetail.compat --list

Runs a program that may import slime, vime and miles: where those are not installed, they are
Dovetail's modules. Also in the Python processes that the program starts.
"""


def main(argv: list[str]) -> int:
    """Run what `argv` says, as `__main__`; 2 when it says nothing."""
    if not argv or argv[0] in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(_USAGE)
        return 0 if argv else 2
    if argv[0] == "--list":
        sys.stdout.write("".join(f"{name:<60}{ours}\n" for name, ours in sorted(aliases().items())))
        return 0
    if argv[0] in ("-m", "-c") and len(argv) == 1:
        sys.stderr.write(f"{argv[0]} needs an argument\n\n{_USAGE}")
        return 2
    install()
    # `python -m` put the working directory there; python itself puts what belongs to the program.
    del sys.path[0]
    if argv[0] == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *argv[2:]]
        _run_text(argv[1])
    else:
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
    return 0


def _run_text(text: str) -> None:
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    FunctionType(compile(text, "<string>", "exec"), main_module.__dict__)()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
