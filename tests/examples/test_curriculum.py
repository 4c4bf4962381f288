"""The curriculum moves with the rewards it sees, and a checkpoint keeps its place."""

from __future__ import annotations

import json

import pytest

from dovetail.hooks import ArgsView
from dovetail.types import DataSourceCall
from examples.curriculum.curriculum import LEVELS, WINDOW, Curriculum
from tests.examples.example_run import samples_of

STEPS = 34
"""In which random weights learn the first level, whichever tokens an engine draws."""


def curriculum():
    return Curriculum(DataSourceCall(ArgsView(None, n_samples_per_prompt=2, rollout_seed=0)))


def saw(source, reward, num_groups=WINDOW):
    groups = source.get_samples(num_groups)
    for sample in (sample for group in groups for sample in group):
        sample.reward = reward
    source.saw(groups)
    return groups


def test_it_goes_up_after_good_groups_and_down_after_bad_ones():
    source = curriculum()
    levels = []
    for reward in (0.9, 0.5, 0.9, 0.1, 0.0, 0.0, *[1.0] * 9):
        saw(source, reward)
        levels.append(source.level)
    assert levels == [1, 1, 2, 1, 0, 0, 1, 2, 3, *[4] * 6]


def test_groups_of_an_earlier_level_do_not_count():
    source = curriculum()
    old = saw(source, 1.0)
    assert source.level == 1
    source.saw(old)
    assert source.level == 1 and source.seen == []


def test_sums_are_of_the_level_and_numbered_through():
    source = curriculum()
    source.level = 2
    samples = [sample for group in source.get_samples(30) for sample in group]
    assert [sample.index for sample in samples] == list(range(60))
    for sample in samples:
        a, b = map(int, sample.prompt.rstrip("=").split("+"))
        assert max(a, b) < LEVELS[2] and sample.label == f"{a + b:03d}"


def test_a_restored_source_goes_on_as_the_saved_one():
    source = curriculum()
    saw(source, 1.0)
    source.add_samples(saw(source, 1.0, num_groups=3)[:2])
    state = json.loads(json.dumps(source.state_dict(), default=str))
    other = curriculum()
    other.load_state_dict(state)
    one, two = source.get_samples(5), other.get_samples(5)
    assert [[s.prompt for s in g] for g in one] == [[s.prompt for s in g] for g in two]
    assert [g[0].index for g in one] == [g[0].index for g in two]
    assert (other.level, other.seen) == (source.level, source.seen)


def test_a_run_climbs_the_levels_and_a_resumed_one_stays_there(run_example, tmp_path):
    flags = ["--rollout-batch-size", 8, "--lr", "3e-3"]
    rows = run_example("curriculum", *flags, "--num-rollout", STEPS, "--save-interval", STEPS)
    levels = [row["curriculum/level"] for row in rows]
    assert levels[0] == 0 and levels[-1] >= 1, levels
    resumed = ["--num-rollout", STEPS + 1, "--load", tmp_path / "run0"]
    (row,) = run_example("curriculum", *flags, *resumed)
    assert row["step"] == STEPS + 1 and row["curriculum/level"] >= 1
    last, first = samples_of(tmp_path, STEPS), samples_of(tmp_path, STEPS + 1, run=1)
    assert first[0]["group_index"] == last[-1]["group_index"] + 1


@pytest.mark.parametrize("field", ["level", "next_group", "seen", "returned"])
def test_the_state_has_all_that_matters(field):
    assert field in curriculum().state_dict()
