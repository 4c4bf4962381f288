"""Processes that train together: each calls one function of the tests, and says what came of it."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE_S = 300


def on_ranks(world, function, **given):
    """What `function` ("module:name") gives back on each of `world` ranks of a gloo group.

    It is called as `function(rank, world, **given)` with JSON values and gives back one.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        words = [sys.executable, "-m", __name__, str(world), function, json.dumps(given), directory]
        ranks = [
            _start([*words, str(rank)], environment, place / f"{rank}.log") for rank in range(world)
        ]
        try:
            codes = [rank.wait(PATIENCE_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        said = [(place / f"{rank}.log").read_text()[-4000:] for rank in range(world)]
        assert codes == [0] * world, "\n".join(said)
        return [json.loads((place / f"{rank}.json").read_text()) for rank in range(world)]


def _start(words, environment, log):
    with log.open("w") as out:
        return subprocess.Popen(words, env=environment, stdout=out, stderr=out)


def main():
    world, function, given, directory, rank = sys.argv[1:]
    torch.set_num_threads(1)
    place = Path(directory)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place / 'meeting'}",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=60),
    )
    module, name = function.split(":")
    found = getattr(importlib.import_module(module), name)(
        int(rank), int(world), **json.loads(given)
    )
    (place / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
