"""The agent of examples/openai_agent on a real vLLM: nothing but a flag differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.observe.dump import read_samples
from dovetail.observe.run_dir import RunDir
from examples.openai_agent.make_data import make_data
from tests.integration.vllm_server import ROOT, vllm_python
from tests.loop.tiny import read_metrics

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(900), pytest.mark.slow]

CLOSE = 2e-5
STEPS = 3


def test_sessions_on_vllm_record_what_the_trainer_computes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = vllm_python()
    monkeypatch.chdir(ROOT)
    make_data(tmp_path)
    run_dir = tmp_path / "run"
    flags = f"--rollout-engine vllm --engine-python {python} --num-rollout {STEPS}"
    flags += f" --hf-checkpoint {tmp_path}/model --prompt-data {tmp_path}/train.jsonl"
    flags += f" --run-dir {run_dir} --rollout-batch-size 4 --device cpu --num-threads 1"
    flags += " --progress plain --no-use-tensorboard"
    assert main(["train", "examples/openai_agent/run.toml", *flags.split()]) == 0
    rows = [row for row in read_metrics(run_dir) if "train/grad_norm" in row]
    assert len(rows) == STEPS
    # The trainer finds the recorded ids as probable as vLLM said, turn for turn, in every step.
    assert all(row["train/rollout_logprob_max_diff"] < CLOSE for row in rows)
    versions = []
    for step in range(1, STEPS + 1):
        samples = read_samples(RunDir(run_dir).samples(step))
        assert all(sample.metadata["strand"]["of"] == 1 for sample in samples)
        assert any(sum(sample.loss_mask or []) < sample.response_length for sample in samples)
        versions.append({version for sample in samples for version in sample.weight_versions})
    assert versions == [{"0"}, {"1"}, {"2"}]
