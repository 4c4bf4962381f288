"""Dr. GRPO: the loss that a run reports is the sum over tokens by a constant, worked by hand."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from examples.dr_grpo.reducer import DIVISOR, get_pg_loss_reducer
from tests.examples.example_run import samples_of

REWARD = """
def reward(sample):
    return float(sample.response_length)
"""


def test_a_token_weighs_the_same_in_a_short_and_in_a_long_response():
    masks = [torch.ones(2), torch.tensor([1, 1, 1, 0, 1, 1])]
    reduce = get_pg_loss_reducer([4, 8], [2, 6], masks)
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 6.0, 7.0])
    assert float(reduce(losses)) == 28.0 / DIVISOR
    losses.requires_grad_()
    reduce(losses).backward()
    assert losses.grad.tolist() == [1 / 8] * 5 + [0.0] + [1 / 8] * 2


def test_a_run_reports_the_sum_by_the_constant(run_example, tmp_path):
    reward = tmp_path / "by_length.py"
    reward.write_text(REWARD)
    sizes = ["--num-rollout", 2, "--rollout-batch-size", 4, "--n-samples-per-prompt", 4]
    rows = run_example("dr_grpo", *sizes, "--custom-rm-path", f"{reward}:reward")
    for step, row in enumerate(rows, start=1):
        # On the step's own samples the ratio is 1, so a token's loss is minus its advantage: the
        # reward less the group's mean, not divided by its deviation.
        samples = samples_of(tmp_path, step)
        groups = defaultdict(list)
        for sample in samples:
            groups[sample["group_index"]].append(sample["reward"])
        total = 0.0
        for sample in samples:
            siblings = groups[sample["group_index"]]
            advantage = sample["reward"] - sum(siblings) / len(siblings)
            total -= advantage * sample["response_length"]
        assert abs(total) > 0.1
        assert row["train/pg_loss"] == pytest.approx(total / DIVISOR / len(samples), abs=1e-4)
