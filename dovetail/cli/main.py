"""`dovetail COMMAND ...`: one row per command, loaded when it is used.

Exit codes: 0 done, 1 the run failed, 2 it was asked for wrongly and nothing was started, 128 + n
ended by signal n (130: Ctrl-C).
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from dovetail import __version__
from dovetail.types.errors import UsageError


@dataclass(frozen=True)
class Command:
    """One row: what it is called, what it does, where it lives, how it is typed."""

    name: str
    doc: str
    path: str
    """module:function; the function takes the arguments after the name and gives the exit code."""
    usage: str


COMMANDS = (
    Command(
        "train", "Train a model.", "dovetail.cli.train:train", "train [RUN.toml ...] [--flag ...]"
    ),
    Command(
        "eval",
        "Evaluate a model on held-out sets, without training.",
        "dovetail.cli.evaluate:evaluate",
        "eval [DIR] [RUN.toml] [--flag ...]",
    ),
    Command(
        "serve",
        "Serve a model over HTTP, without training.",
        "dovetail.cli.serve:serve",
        "serve [DIR] [RUN.toml] [--flag ...]",
    ),
    Command(
        "config",
        "Show, check or compare settings; write the reference page.",
        "dovetail.cli.config:config",
        "config show|check|diff|docs ...",
    ),
    Command(
        "hooks",
        "List the functions you can put in, start one, try yours out.",
        "dovetail.cli.hooks:hooks",
        "hooks list|show|new|check ...",
    ),
    Command(
        "convert",
        "Export a checkpoint as a Hugging Face directory, or back.",
        "dovetail.cli.convert:convert",
        "convert [--flag ...] SOURCE DIRECTORY",
    ),
)

_HELP = """usage: dovetail COMMAND ...

Post-train language models with reinforcement learning.

{commands}

  dovetail COMMAND --help   says more; train --help lists every setting
  dovetail --version        {version}
  --traceback               with any command: show where an error came from

Start:  dovetail train --hf-checkpoint DIR --prompt-data FILE.jsonl --label-key label \\
            --rm-type math --n-samples-per-prompt 8 --num-rollout 100
"""


def entry() -> None:
    """The console script."""
    code = main(sys.argv[1:])
    # Python looks for garbage once more before it ends: seconds, where torch is loaded.
    gc.freeze()
    if threading.active_count() > 1:
        from dovetail.run.leaving import leave

        leave(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command line; the exit code. Errors are printed, never raised."""
    arguments = [token for token in argv if token != "--traceback"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`dovetail ... | head`): nothing to tell anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from dovetail.cli.failure import report

        return report(error, show_traceback=len(arguments) != len(argv))


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if argv[0] in ("--version", "-V", "version"):
        sys.stdout.write(f"dovetail {__version__}\n")
        return 0
    command = _find(argv[0])
    module, _, name = command.path.partition(":")
    function: Callable[[list[str]], int] = getattr(import_module(module), name)
    return function(list(argv[1:]))


def _find(name: str) -> Command:
    names = [command.name for command in COMMANDS]
    if name in names:
        return COMMANDS[names.index(name)]
    closest = get_close_matches(name, names, n=1)
    hint = f"did you mean dovetail {closest[0]}?" if closest else f"commands: {', '.join(names)}"
    if name.startswith("-"):
        hint = "a command comes first, e.g. dovetail train --lr 1e-6"
    raise UsageError(f"unknown command '{name}'; {hint}")


def _help() -> str:
    width = max(len(command.usage) for command in COMMANDS) + 2
    rows = [f"  {command.usage:<{width}}{command.doc}" for command in COMMANDS]
    return _HELP.format(commands="\n".join(rows), version=f"dovetail {__version__}")
