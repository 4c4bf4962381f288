"""A process killed at any moment of its saves leaves a checkpoint that loads and verifies."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dovetail.checkpoint.manager import CheckpointManager, load_checkpoint

# One parent that has torch ready forks a fresh saver for each line it reads; that is the victim.
NURSERY = """
import os, sys, torch
from dovetail.checkpoint.manager import CheckpointManager
print("ready", flush=True)
for line in sys.stdin:
    directory, step = line.split()
    step = int(step)
    pid = os.fork()
    if pid == 0:
        keeper = CheckpointManager(directory, keep=2)
        print("saving", os.getpid(), flush=True)
        while True:
            step += 1
            tensors = {"w": torch.full((200_000,), float(step)), "v": torch.arange(step)}
            part = (tensors, {"s": step})
            keeper.save(step, {"model": part, "trainer": part})
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@pytest.fixture
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "ready"
    yield process
    process.stdin.close()
    process.wait(timeout=30)


def seconds_of_a_save(directory: Path) -> float:
    part = ({"w": torch.zeros(200_000)}, {})
    seconds = []
    for step in range(5):
        started = time.perf_counter()
        CheckpointManager(directory, keep=1).save(step, {"model": part, "trainer": part})
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def kill_a_saver(nursery: subprocess.Popen, directory: Path, step: int, after_s: float) -> None:
    nursery.stdin.write(f"{directory} {step}\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline().split()[1])
    time.sleep(after_s)
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(pid)], check=True)
    assert nursery.stdout.readline().strip() == "dead"


def test_twenty_kills_at_random_moments_each_leave_a_verified_checkpoint(tmp_path, nursery):
    moments = random.Random(20)
    CheckpointManager(tmp_path, keep=2).save(0, {"model": ({}, {"s": 0})})
    longest_s = 5 * seconds_of_a_save(tmp_path / "elsewhere")
    step = cut_short = 0
    for _ in range(20):
        kill_a_saver(nursery, tmp_path, step, moments.uniform(0.0, longest_s))
        cut_short += any(p.name.startswith(".") for p in tmp_path.iterdir())
        loaded = load_checkpoint(tmp_path)
        assert loaded.skipped == [], "a kill leaves no damaged checkpoint under a final name"
        assert loaded.step >= step, "no finished checkpoint is lost"
        step = loaded.step
        for tensors, facts in loaded.parts.values():
            assert facts == {"s": step}
            if step:
                assert torch.equal(tensors["w"], torch.full((200_000,), float(step)))
                assert torch.equal(tensors["v"], torch.arange(step))
    assert cut_short >= 3, "some kills hit the middle of a save"
    assert step >= 3, "some saves got through"
