"""Trainers' side of updates, as processes that start within milliseconds and can be killed: one
process with torch and a model's weights loaded forks each.

    python -m tests.givers MODEL_DIR...

Reads a JSON object a line and answers each with one:

    {"wanted": {...}, "version": N, "engines": E, "dies_at": K, "out": FILE}  -> {"pid": N}
    {"poll": N} -> {"code": null} or {"code": 0}                  negative: ended by a signal

A giver sends the weights of MODEL_DIR number `version` and writes what it announced (or, where
nothing is announced, sent) as a line of FILE; with `dies_at` it kills itself (SIGKILL) before it
gives so many tensors. It stays until its standard input of a pipe would end: until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dovetail.transport.place import Wanted
from dovetail.transport.sender import make_sender
from dovetail.types.weights import Snapshot
from tests import takers


def told(snapshot: Snapshot, what: str) -> str:
    directory = None if snapshot.directory is None else str(snapshot.directory)
    return json.dumps({"what": what, **asdict(snapshot), "directory": directory}) + "\n"


def dying(tensors: dict[str, torch.Tensor], at: int) -> Iterator[tuple[str, torch.Tensor]]:
    for number, pair in enumerate(tensors.items()):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair


def give(asked: dict[str, Any], weights: list[dict[str, torch.Tensor]], model_dir: Path) -> None:
    wanted = dict(asked["wanted"])
    disk = wanted.pop("disk_dir", None)
    sender = make_sender(Wanted(**wanted, disk_dir=None if disk is None else Path(disk)), model_dir)
    version, own = asked["version"], weights[asked["version"] % len(weights)]
    with Path(asked["out"]).open("a") as out:
        if sender.meets:
            out.write(told(sender.announce(version, asked["engines"]), "announced"))
            out.flush()
        out.write(told(sender.send(version, dying(own, asked.get("dies_at", -1))), "sent"))
    time.sleep(600)  # What it wrote goes with it.


def main() -> None:
    places = [Path(place) for place in sys.argv[1:]]
    weights = [load_file(place / "model.safetensors") for place in places]
    takers.serve(lambda asked: give(asked, weights, places[0]))


if __name__ == "__main__":
    main()
