"""`config show --plan` and `train --dry-run`: a plan, and nothing else."""

import json
import sys
from pathlib import Path

import pytest

from dovetail.cli.main import main

SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Settings of a run whose model is a configuration alone."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "data.jsonl").write_text("{}\n")
    run = tmp_path / "run.toml"
    run.write_text(
        f'[model]\nhf_checkpoint = "{tmp_path}/model"\ndevice = "cpu"\n[data]\nnum_rollout = 1\n'
        f'prompt_data = "{tmp_path}/data.jsonl"\n[reward]\nrm_type = "math"\n'
        "[rollout]\nn_samples_per_prompt = 2\n"
    )
    return [str(run)]


def test_a_dry_run_shows_checks_plan_and_memory_and_starts_nothing(
    run: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    sys.modules.pop("dovetail.run.train", None)
    assert main(["train", *run, "--dry-run", "--run-dir", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ok: these settings can work together\nlocal: one process on cpu")
    # 128 x 64, 2 layers of 2 x 64 x 64 + 2 x 64 x 32 + 3 x 64 x 128 + 2 x 64 + 2 x 16, a norm.
    assert "policy: 82.30 k parameters" in text
    assert "\ntrainer" in text and "\nengine" in text and "MiB of each device" in text
    assert sorted(tmp_path.rglob("*")) == before
    assert "dovetail.run.train" not in sys.modules


def test_the_plan_is_shown_instead_of_the_settings(
    run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", *run, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("local: one process on cpu")
    assert main(["config", "show", *run, "--plan", "--only-set"]) == 2


@pytest.mark.parametrize("command", [["train", "--dry-run"], ["config", "show", "--plan"]])
def test_a_plan_that_can_not_be_ends_with_2(
    run: list[str], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = command
    at = [first, *rest] if first == "train" else [first, rest[0], rest[1]]
    flags = "--mode disaggregated --actor-num-gpus-per-node 2 --tensor-model-parallel-size 4"
    assert main([*at, *run, *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "2 trainer ranks" in captured.err


def test_a_model_that_is_not_here_has_a_plan_without_memory(
    run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", *run, "--plan", "--hf-checkpoint", "org/name"]) == 0
    assert "org/name is no directory here: nothing to count" in capsys.readouterr().out
