"""An unmodified agent of the `openai` package, trained through its sessions."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from examples.openai_agent.make_data import CALL, make_data
from tests.examples.example_run import RunExample, samples_of


def test_an_agent_learns_to_use_its_tool_and_not_what_the_tool_says(
    run_example: RunExample, tmp_path: Path
) -> None:
    make_data(tmp_path)
    model, data = tmp_path / "model", tmp_path / "train.jsonl"
    flags = ["--hf-checkpoint", model, "--prompt-data", data, "--rollout-batch-size", 4]
    held_out = ["--eval-prompt-data", "held_out", tmp_path / "few.jsonl", "--eval-interval", 12]
    lines = (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = run_example("openai_agent", *flags, *held_out, "--num-rollout", 12)
    rewards = [row["rollout/reward"] for row in rows if "rollout/reward" in row]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert any("eval/held_out/reward" in row for row in rows)
    # The trainer finds the recorded ids as probable as the engine did.
    assert all(row.get("train/rollout_logprob_max_diff", 0) < 1e-4 for row in rows)

    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = [one for step in range(1, 13) for one in samples_of(tmp_path, step)]
    called = [one for one in samples if one["metadata"]["calls"]]
    assert called
    for sample in samples:
        ids = sample["tokens"][-sample["response_length"] :]
        told = [token for token, mask in zip(ids, sample["loss_mask"], strict=True) if not mask]
        said = tokenizer.decode(told)
        right = f"<|tool|>{sample['label']}<eos>"
        assert said.count(right) == said.count("<|tool|>")
        assert said.count("<|tool|>") <= sample["metadata"]["calls"]
        for log_prob, mask in zip(sample["rollout_log_probs"], sample["loss_mask"], strict=True):
            assert (log_prob < 0) == bool(mask)
        assert (CALL in tokenizer.decode(ids)) is bool(sample["metadata"]["calls"])
        assert sample["session_id"] and sample["metadata"]["strand"]["of"] == 1
