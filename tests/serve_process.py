"""`dovetail serve` as a process of its own, for tests: it is gone when the block ends."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_START_S = 150.0
_END_S = 20.0


@contextlib.contextmanager
def serving(model: Path, *flags: str, log: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address it says, and the process.

    Args:
        flags: beside the model's.
        log: gets what it writes to stderr.
    """
    command = [sys.executable, "-m", "dovetail", "serve", "--hf-checkpoint", str(model), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
    try:
        yield _address(process, log), process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    deadline, said = time.monotonic() + _START_S, ""
    while time.monotonic() < deadline:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        line = process.stdout.readline() if ready else ""
        said += line
        if found := re.search(r"at (http://\S+)", line):
            return found[1]
        if ready and not line:
            break
    raise AssertionError(f"dovetail serve did not come up:\n{said}\n{log.read_text()}")
