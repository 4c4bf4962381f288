"""The inside of a worker process: what every worker module does around its own work.

A worker module is run as `python -m MODULE PARENT_PID MEMORY_BYTES` by `workers` and calls `serve`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[], Answer]) -> None:
    """Answer request lines with what `load` returns, until the parent closes our input or dies.

    `load` runs once, before any clock does; an ImportError out of it is told to the parent.
    Whatever the answering raises ends the process: to the parent a crash of that request.
    """
    parent_pid, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    replies = _take_stdout()
    _die_with(parent_pid)
    # Ctrl-C and a scheduler's SIGTERM go to the whole group; the parent decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        answer = load()
    except ImportError as error:
        _send(replies, {"error": str(error)})
        return
    _send(replies, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The default action of the alarm ends the process even inside one long C call: should the
        # parent be gone, nothing is left running.
        signal.setitimer(signal.ITIMER_REAL, request.pop("limit_s"))
        reply = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)


def _take_stdout() -> BinaryIO:
    """Our replies' pipe; whatever a library prints goes nowhere."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    return replies


def _die_with(parent_pid: int) -> None:
    if sys.platform == "linux":
        # The kernel kills us when the thread that started us ends, however it ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(0)


def _send(replies: BinaryIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()
