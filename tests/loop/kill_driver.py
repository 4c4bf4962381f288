"""Kills a run with SIGKILL again and again until it has survived to its end.

    python kill_driver.py WORKDIR NUM_KILLS SEED FLAG...

Every attempt is a child process that trains with the flags, resuming from the newest checkpoint
if there is
one. It is forked from a process that has the libraries loaded, so that attempts are short; the
kill comes
at a random moment between the fork and what the rest of the run may take. Prints one JSON line:
kills done, and how many struck before the first checkpoint, in a save, or elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch  # noqa: F401  # loaded once, before the forks
import transformers  # noqa: F401

from dovetail.cli.main import main


def attempt(run_dir: Path, flags: list[str]) -> int:
    """Fork a child that trains; returns its process id."""
    checkpoints = run_dir / "checkpoints"
    load = ["--load", str(checkpoints)] if has_checkpoint(checkpoints) else []
    pid = os.fork()
    if pid:
        return pid
    log = os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(main(["train", *flags, "--run-dir", str(run_dir), *load]))


def has_checkpoint(checkpoints: Path) -> bool:
    """Whether a finished checkpoint is there."""
    return checkpoints.is_dir() and any(p.name.startswith("step_") for p in checkpoints.iterdir())


def strike_place(run_dir: Path) -> str:
    """Where the run was when it was killed, as far as its directory tells."""
    checkpoints = run_dir / "checkpoints"
    if not checkpoints.is_dir():
        return "before the first checkpoint"
    unfinished = any("unfinished" in p.name for p in checkpoints.iterdir())
    return "inside a save" if unfinished else "between saves"


def drive(workdir: Path, num_kills: int, seed: int, flags: list[str]) -> int:
    """Kill and resume; the last attempt runs to its end."""
    rng = random.Random(seed)
    places: Counter[str] = Counter()
    kills, number, longest_s = 0, 0, 2.0
    run_dir = workdir / "killed-0"
    while kills < num_kills:
        if run_dir.exists() and not has_checkpoint(run_dir / "checkpoints"):
            number += 1
            run_dir = workdir / f"killed-{number}"
        pid = attempt(run_dir, flags)
        time.sleep(rng.uniform(0.05, longest_s))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            # It finished before the blow: start over with shorter lives.
            if os.WEXITSTATUS(status) != 0:
                return os.WEXITSTATUS(status)
            longest_s *= 0.7
            number += 1
            run_dir = workdir / f"killed-{number}"
            continue
        kills += 1
        places[strike_place(run_dir)] += 1
    if run_dir.exists() and not has_checkpoint(run_dir / "checkpoints"):
        run_dir = workdir / f"killed-{number + 1}"
    _, status = os.waitpid(attempt(run_dir, flags), 0)
    print(json.dumps({"kills": kills, "places": places, "run_dir": str(run_dir)}))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    workdir, num_kills, seed, *flags = sys.argv[1:]
    sys.exit(drive(Path(workdir), int(num_kills), int(seed), flags))
