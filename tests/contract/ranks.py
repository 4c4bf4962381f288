"""Processes that train together: a group of ranks that lives for a whole module of tests and runs
one job after another."""

import gc
import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

PATIENCE_S = 300


class Ranks:
    """A context: `world` processes of one gloo group. They end with it, or with this process.

    A job that fails on any rank ends them all, since the others may wait for it for ever; the next
    one gets new ones.
    """

    def __init__(self, world):
        self.world, self.processes, self.jobs = world, [], 0
        self.place = tempfile.TemporaryDirectory()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._end()
        self.place.cleanup()

    def call(self, function, **given):
        """What `function` ("module:name") gives back on each rank. It is called as
        `function(rank, world, **given)` with JSON values and gives back one."""
        if not self.processes:
            self._start()
        self.jobs += 1
        job = json.dumps({"number": self.jobs, "function": function, "given": given})
        for process in self.processes:
            process.stdin.write(job + "\n")
            process.stdin.flush()
        missing = self._wait()
        answers = [self._answer(rank) for rank in range(self.world)]
        wrong = [answer["error"] for answer in answers if answer and "error" in answer]
        if wrong or missing:
            self._end()
            logs = [self._log(rank) for rank in missing]
            raise AssertionError("\n".join([f"ranks without an answer: {missing}", *wrong, *logs]))
        return [answer["value"] for answer in answers]

    def _start(self):
        meeting = Path(self.place.name) / f"meeting-{self.jobs}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(self.world):
            words = [sys.executable, "-m", __name__, str(self.world), str(rank), str(meeting)]
            with (Path(self.place.name) / f"{rank}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        words,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )

    def _wait(self):
        """Until every rank has said something, or one that it failed. Gives the silent ones."""
        silent, until = set(range(self.world)), time.monotonic() + PATIENCE_S
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while silent and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    said = key.fileobj.readline().strip()
                    if said != "done":
                        # Failed, or gone: the others may wait for it.
                        return sorted(silent - ({key.data} if said == "failed" else set()))
                    silent.discard(key.data)
        return sorted(silent)

    def _answer(self, rank):
        file = Path(self.place.name) / f"{rank}-{self.jobs}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def _log(self, rank):
        return (Path(self.place.name) / f"{rank}.log").read_text()[-4000:]

    def _end(self):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.processes = []


def forget_groups():
    """End all groups but that of all ranks. Each has three threads of gloo's, and Megatron makes
    eighteen groups for a layout: left alone, threads by the thousand wake up to do nothing."""
    if (megatron := sys.modules.get("megatron.core.parallel_state")) is not None:
        megatron.destroy_model_parallel()
    gc.collect()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def main():
    world, rank, meeting = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        # Not less: on a busy machine a rank may come to an import long after the others, and one
        # that failed or is gone ends them all without it.
        timeout=timedelta(seconds=PATIENCE_S),
    )
    said = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            module, name = job["function"].split(":")
            function = getattr(importlib.import_module(module), name)
            answer = {"value": function(rank, world, **job["given"])}
        except BaseException:
            answer = {"error": f"rank {rank}: {traceback.format_exc()}"}
        file = meeting.parent / f"{rank}-{job['number']}.json"
        file.with_suffix(".part").write_text(json.dumps(answer))
        file.with_suffix(".part").rename(file)
        forget_groups()
        print("failed" if "error" in answer else "done", file=said, flush=True)


if __name__ == "__main__":
    main()
