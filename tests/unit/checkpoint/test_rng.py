"""Random states: after restoring, every generator draws the same numbers again."""

import random

import numpy as np
import pytest
import torch

from dovetail.checkpoint.manager import CheckpointManager, load_checkpoint
from dovetail.checkpoint.rng import capture_rng, restore_rng, seed_all
from dovetail.types.errors import CheckpointError


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def test_the_same_numbers_follow_after_a_round_trip_through_the_disk(tmp_path):
    seed_all(5)
    draw()  # leaves a cached second Gaussian in Python's and in numpy's generator
    CheckpointManager(tmp_path, keep=1).save(1, {"rng": capture_rng()})
    expected = draw() + draw()
    seed_all(6)
    restore_rng(*load_checkpoint(tmp_path).part("rng"))
    assert draw() + draw() == expected


def test_one_seed_gives_the_same_numbers_everywhere():
    seed_all(7)
    first = draw()
    seed_all(7)
    assert draw() == first


def test_foreign_states_are_refused():
    tensors, facts = capture_rng()
    with pytest.raises(CheckpointError, match="random states"):
        restore_rng({**tensors, "python": torch.zeros(3)}, facts)
    with pytest.raises(CheckpointError, match="random states"):
        restore_rng(tensors, {})


def test_a_state_of_an_absent_cuda_device_is_left_out_with_a_warning(caplog):
    tensors, facts = capture_rng()
    restore_rng({**tensors, "torch_cuda_63": torch.zeros(16, dtype=torch.uint8)}, facts)
    assert "CUDA device 63" in caplog.text
