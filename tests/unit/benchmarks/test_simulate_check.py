"""Speeds fitted to real steps, and what is read of a run."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.simulate_check import (
    CASES,
    STEPS,
    TOKEN_S,
    Case,
    Measured,
    compare,
    fitted_engine,
    fitted_trainer,
    read_run,
    table,
)


def _made(case: Case, seed: int) -> list[Measured]:
    """Steps of a machine whose speeds are known, one after the other."""
    rng, end, steps = random.Random(seed), 0.0, []
    for _ in range(STEPS):
        drawn = [[1 + int(rng.expovariate(1 / 11)) for _ in range(case.samples)]]
        drawn += [
            [rng.randrange(1, 48) for _ in range(case.samples)] for _ in range(case.groups - 1)
        ]
        lengths = tuple(map(tuple, drawn))
        tokens, longest = sum(map(sum, lengths)), max(map(max, lengths))
        rollout = 0.004 * longest + 0.0002 * tokens + 0.003 * case.groups
        if case.sleeps:
            rollout = TOKEN_S * longest
        train = 0.05 + 0.0003 * tokens
        end += rollout + train + 0.001
        steps.append(Measured(rollout, train, 0.001, end, lengths))
    return steps


def test_speeds_are_fitted_to_steps_of_several_sizes() -> None:
    steps = [step for case in CASES[:2] for step in _made(case, 1)]
    engine = fitted_engine(steps)
    assert engine.decode_base_s == pytest.approx(0.004, rel=1e-6)
    assert engine.decode_sequence_s == pytest.approx(0.0002, rel=1e-6)
    assert engine.prompt_s == pytest.approx(0.003, rel=1e-6)
    assert fitted_trainer(steps) == pytest.approx((0.0003, 0.05, 0.001))


def test_steps_of_the_known_machine_are_predicted() -> None:
    cases = [case for case in CASES if not case.max_lag]
    rows = compare({case.name: [_made(case, seed) for seed in (1, 2)] for case in cases})
    assert [row["case"] for row in rows] == [case.name for case in cases]
    assert all(abs(row["error"]) < 0.1 for row in rows), rows
    assert "(its speeds were used)" in table(rows)


def test_a_run_directory_is_read(tmp_path: Path) -> None:
    times = {"time/rollout_s": 1.0, "time/train_s": 2.0, "time/publish_s": 0.5, "time/step_s": 3.5}
    lines = [{"step": 0, "eval/x": 1.0}, {"step": 1, "time": 7.0, **times}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "samples").mkdir()
    samples = [{"group_index": g, "response_length": n} for g, n in ((0, 3), (0, 4), (1, 0))]
    (tmp_path / "samples" / "step_000001.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (step,) = read_run(tmp_path)
    assert step == Measured(1.0, 2.0, 0.5, 7.0, ((3, 4), (1,)))
    assert (step.tokens, step.longest) == (8, 4)
