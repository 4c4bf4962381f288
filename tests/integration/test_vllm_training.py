"""The arithmetic example on a real vLLM: `dovetail train --rollout-engine vllm`."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.observe.dump import read_samples
from dovetail.observe.run_dir import RunDir
from examples.arithmetic.make_task import make_task
from tests.integration.vllm_server import ROOT, vllm_python
from tests.loop.tiny import read_metrics

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(900), pytest.mark.slow]

CLOSE = 5e-5
STEPS = 14
QUIET = ["--progress", "plain", "--no-use-tensorboard", "--device", "cpu", "--num-threads", "1"]


def train(*flags: object) -> None:
    assert main(["train", *map(str, flags), *QUIET]) == 0


def test_sums_are_learned_on_vllm_with_new_weights_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    python = vllm_python()
    monkeypatch.chdir(ROOT)
    task, warm, run_dir = tmp_path / "task", tmp_path / "warm", tmp_path / "run"
    make_task(task, seed=0)
    own = ["--hf-checkpoint", task / "model", "--prompt-data", task / "sft.jsonl"]
    train(
        *("examples/arithmetic/sft.toml", *own, "--run-dir", tmp_path / "sft"),
        *("--save-hf", warm),
    )
    own = ["--hf-checkpoint", warm, "--prompt-data", task / "train.jsonl"]
    engine = ["--rollout-engine", "vllm", "--engine-python", python, "--vllm-max-num-seqs", 128]
    steps = ["--num-rollout", STEPS, "--lr", "2e-4", "--lr-warmup-iters", 2]
    with caplog.at_level(logging.WARNING):
        # At this temperature vLLM reports its processed logprobs.
        train(
            *("examples/arithmetic/grpo.toml", *own, *engine, *steps, "--run-dir", run_dir),
            *("--rollout-temperature", 0.9, "--eval-interval", STEPS // 2),
            *("--eval-prompt-data", "heldout", task / "heldout.jsonl"),
        )
    rows = [row for row in read_metrics(run_dir) if "rollout/reward" in row]
    rewards = [row["rollout/reward"] for row in rows]
    assert len(rewards) == STEPS
    before, after = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert after > before + 0.08
    evaluated = [
        r["eval/heldout/reward"] for r in read_metrics(run_dir) if "eval/heldout/reward" in r
    ]
    assert evaluated[-1] > evaluated[0] + 0.2
    # What vLLM said of each token is what the trainer computes from the weights of that step, as
    # exactly as float32 has it: every update arrived, and no older keys and values were used.
    diffs = [row["train/rollout_logprob_max_diff"] for row in rows]
    assert max(diffs) < CLOSE
    for step in range(1, STEPS + 1):
        samples = read_samples(RunDir(run_dir).samples(step))
        assert len(samples) == 512
        assert {tuple(sample.weight_versions) for sample in samples} == {(str(step - 1),)}
        assert all(len(s.rollout_log_probs) == s.response_length for s in samples)
    assert not [r for r in caplog.records if "log_softmax" in r.getMessage()]
