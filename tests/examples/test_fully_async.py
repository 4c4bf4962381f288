"""Long answers do not hold a step up: they join a later one, older, within bounds."""

from __future__ import annotations

from pathlib import Path

from tests.examples.example_run import RunExample, samples_of

STEPS = 12


def test_long_answers_join_a_later_step(run_example: RunExample, tmp_path: Path) -> None:
    rows = run_example("fully_async", "--num-rollout", STEPS)
    staleness = [row["rollout/fully_async/max_staleness"] for row in rows]
    assert max(staleness) >= 1
    assert max(staleness) <= 4
    assert staleness[0] == 0
    # Older tokens are weighed by what the policy has become.
    assert any(abs(row["train/tis"] - 1) > 1e-6 for row in rows)
    assert all(row["train/grad_norm"] >= 0 for row in rows)

    spread = 0
    seen = set()
    for step in range(1, STEPS + 1):
        samples = samples_of(tmp_path, step)
        assert len(samples) == 32
        # Every sample is trained on once.
        indices = {sample["index"] for sample in samples}
        assert not indices & seen
        seen |= indices
        for sample in samples:
            versions = [int(version) for version in sample["weight_versions"]]
            assert versions == sorted(versions)
            assert step - 1 - 4 <= versions[0] <= versions[-1] <= step - 1
            spread += versions[0] != versions[-1]
            thinks = sample["index"] % 13 == 0
            assert sample["response_length"] == 48 if thinks else sample["response_length"] <= 4
    # Some answers went on under new weights.
    assert spread > 0
