"""A run on a vLLM that runs already: `--rollout-external-engine-addrs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.observe.dump import read_samples
from dovetail.observe.run_dir import RunDir
from examples.arithmetic.make_task import make_task
from tests.integration.vllm_server import ROOT, Server, restore
from tests.loop.tiny import read_metrics

pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.timeout(600), pytest.mark.slow]

STEPS = 3
CLOSE = 5e-5


def test_a_mixture_of_experts_is_trained_on_a_vllm_that_runs_already(
    vllm_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    make_task(tmp_path, seed=0)
    flags = f"--hf-checkpoint {vllm_server.model_dir} --prompt-data {tmp_path}/train.jsonl"
    flags += f" --rollout-external-engine-addrs {vllm_server.url.removeprefix('http://')}"
    flags += f" --rollout-engine vllm --num-rollout {STEPS} --rollout-batch-size 4 --dtype float32"
    flags += " --input-key input --label-key label --n-samples-per-prompt 4 --lr 1e-3"
    flags += " --rollout-max-response-len 16 --custom-rm-path examples/arithmetic/reward.py:reward"
    flags += f" --run-dir {tmp_path}/run --progress plain --no-use-tensorboard --device cpu"
    flags += " --num-threads 1 --entropy-coef 0.01"  # No sum is right: entropy moves the weights.
    try:
        assert main(["train", *flags.split()]) == 0
        assert vllm_server.process.alive
    finally:
        restore(vllm_server)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/grad_norm" in row]
    assert len(rows) == STEPS and all(row["train/grad_norm"] > 0 for row in rows)
    # Experts too arrived with every update.
    assert max(row["train/rollout_logprob_max_diff"] for row in rows) < CLOSE
    for step in range(1, STEPS + 1):
        samples = read_samples(RunDir(tmp_path / "run").samples(step))
        assert {tuple(sample.weight_versions) for sample in samples} == {(str(step - 1),)}
