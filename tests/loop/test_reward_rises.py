"""The whole loop on a CPU learns: GRPO on a reward that a tiny model can find in seconds."""

from __future__ import annotations

from pathlib import Path

from dovetail.cli.main import main
from tests.loop.tiny import make_model, make_rows, read_metrics

NUM_STEPS = 40
REWARD = """
def reward(sample):
    return sample.response.count("a") / 8
"""
FLAGS = (
    f"--num-rollout {NUM_STEPS} --label-key label --rollout-shuffle --rollout-batch-size 4 "
    "--n-samples-per-prompt 8 --rollout-max-response-len 8 --lr 1e-2 --dtype float32 "
    "--progress plain --no-use-tensorboard --device cpu --num-threads 1"
).split()


def test_the_mean_reward_of_a_grpo_run_rises(tmp_path: Path) -> None:
    model, rows = make_model(tmp_path / "model"), make_rows(tmp_path / "rows.jsonl", 12)
    (tmp_path / "user.py").write_text(REWARD, encoding="utf-8")
    own = ["--hf-checkpoint", model, "--prompt-data", rows, "--run-dir", tmp_path / "run"]
    reward = f"{tmp_path / 'user.py'}:reward"
    assert main(["train", *FLAGS, *map(str, own), "--custom-rm-path", reward]) == 0
    rewards = [row["rollout/reward"] for row in read_metrics(tmp_path / "run")]
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert before < 0.1
    assert after > 0.7
    assert (tmp_path / "run" / "reward.png").stat().st_size > 1000
