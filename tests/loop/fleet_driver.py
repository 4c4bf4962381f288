"""Runs of `dovetail` with one engine more, `quick` (tests/quick_engine.py).

Reads a JSON object a line and answers each with one:

    {"argv": [...], "env": {...}, "out": FILE} -> {"pid": N}     a run begins, in its own session
    {"poll": N} -> {"code": null} or {"code": 0}                 negative: ended by that signal

Every run is a child, forked from this process, which has the libraries loaded: it begins within a
second. The witness file and the delays of its engines are in its environment: QUICK_WITNESS,
QUICK_TOKEN_S, QUICK_LOAD_S.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Loaded once, before the forks.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

from dovetail.engines import table
from dovetail.engines.launch import LaunchSettings, LaunchSpec

PROGRAM = Path(__file__).parents[1] / "quick_engine.py"


def launch(settings: LaunchSettings) -> LaunchSpec:
    delays = [os.environ.get(name, "0") for name in ("QUICK_TOKEN_S", "QUICK_LOAD_S")]
    witness = os.environ["QUICK_WITNESS"]
    start = [sys.executable, "-I", "-S", str(PROGRAM)]
    return LaunchSpec([*start, str(settings.port), witness, *delays])


NAME = "tests.loop.fleet_driver"
ROW = table.EngineRow(
    name="quick",
    doc="Of the tests.",
    launch=f"{NAME}:launch",
    client="dovetail.engines.sglang.client:make_client",
)


def begin(argv: list[str], env: dict[str, str], out: str) -> int:
    """Fork a child that is the command `dovetail argv`; its process id."""
    from dovetail.cli.main import main

    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.environ.update(env)
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    try:
        code = main(argv)
    finally:
        sys.stdout.flush()
        os._exit(code)


def poll(pid: int) -> int | None:
    """The child's exit code; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    sys.modules[NAME] = sys.modules[__name__]
    table.ENGINES = (*table.ENGINES, ROW)
    # They read the table when they are imported.
    import dovetail.cli.train
    import dovetail.engines.sglang.client
    import dovetail.run.train  # noqa: F401

    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        told = {"code": poll(asked["poll"])} if "poll" in asked else {"pid": begin(**asked)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
