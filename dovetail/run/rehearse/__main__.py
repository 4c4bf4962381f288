"""The child: `python -m dovetail.run.rehearse REPLY_FD DUMP_FD ASKED_FD`, with the request on its
input."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from typing import Any

from dovetail.run.rehearse.stuck import write_stacks

_PR_SET_PDEATHSIG = 1


def main(reply_fd: int, dump_fd: int, asked_fd: int) -> None:
    """Rehearse item after item, and tell a verdict of each."""
    if sys.platform == "linux":
        # Nothing is left running when whoever started us dies.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(reply_fd, "w", encoding="utf-8")
    faulthandler.enable(dump_fd)
    faulthandler.register(signal.SIGUSR1, dump_fd, all_threads=True)
    threading.Thread(target=write_stacks, args=(asked_fd, dump_fd), daemon=True).start()
    request = json.load(sys.stdin)
    # User code that asks for input gets an end of file, not a wait for ever.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:] = request["sys_path"]
    # What our own parts would tell the log of a run is no output of the user's.
    for name in ("dovetail", "uvicorn"):
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False

    def say(**message: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    from dovetail.run.rehearse.child import rehearse_items

    rehearse_items(request, say)
    # Threads that user code left behind must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
