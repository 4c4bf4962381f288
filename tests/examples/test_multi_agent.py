"""Three agents of one model: who is compared with whom, who is paid for what, and they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.examples.example_run import RunExample, samples_of

PROBLEMS, SOLVERS = 4, 8


def _said(sample: dict[str, Any]) -> str:
    return str(sample["response"]).replace("<eos>", "").replace("<pad>", "")


def test_agents_are_paid_for_what_they_are_for(
    run_example: RunExample, task: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    lines = (task / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    few.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--num-rollout", 16, "--rollout-batch-size", PROBLEMS]
    flags += ["--eval-prompt-data", "few", few, "--eval-interval", 10]
    rows = run_example("multi_agent", *flags)
    critic = [row["agents/critic_reward"] for row in rows if "agents/critic_reward" in row]
    assert sum(critic[-3:]) > sum(critic[:3]) + 0.3
    assert any("eval/few/reward" in row for row in rows)

    samples = samples_of(tmp_path, 10)
    by_role: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_role.setdefault(sample["metadata"]["role"], []).append(sample)
    assert {role: len(found) for role, found in by_role.items()} == {
        "solver": PROBLEMS * SOLVERS,
        "critic": PROBLEMS * SOLVERS,
        "selector": PROBLEMS * SOLVERS,
    }
    # A group is one role of one problem; an execution has one sample of each role.
    assert len({(one["group_index"], one["metadata"]["role"]) for one in samples}) == PROBLEMS * 3
    assert len({one["group_index"] for one in samples}) == PROBLEMS * 3
    solvers = {one["rollout_id"]: one for one in by_role["solver"]}
    assert len(solvers) == PROBLEMS * SOLVERS
    for critic_sample in by_role["critic"]:
        solver = solvers[critic_sample["rollout_id"]]
        assert critic_sample["prompt"] == f"{solver['prompt']}{_said(solver)}-"
        right = _said(solver) == solver["label"]
        assert solver["reward"] == float(right)
        assert critic_sample["reward"] == 0.5 * (_said(critic_sample) == str(int(right)))
    for selector in by_role["selector"]:
        assert selector["prompt"].startswith(solvers[selector["rollout_id"]]["prompt"])
        assert selector["prompt"].count("*") >= 2
        assert selector["reward"] in (0.0, 0.5)
