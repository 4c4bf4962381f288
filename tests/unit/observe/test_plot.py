"""Plots: the right points, readable without colour, inside 80 columns."""

import json
import math

import pytest

from dovetail.observe.plot import (
    curve_of,
    plot_curves,
    plot_reward,
    plot_run,
    smooth,
    terminal_plot,
)
from dovetail.types.errors import DataError

ROWS = [
    {"step": 0, "eval/math/reward": 0.2, "eval/math/pass@4": 0.5},
    {"step": 1, "rollout/reward": 0.1, "train/loss": 5.0},
    {"step": 2, "rollout/reward": None},
    {"step": 3, "rollout/reward": 0.5},
    {"step": 3, "eval/math/reward": 0.6},
]


def write_run(directory, rows=ROWS):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def test_a_curve_has_the_reward_of_each_step_and_of_each_evaluation_set():
    curve = curve_of(ROWS, "run")
    assert (curve.metric, curve.steps, curve.values) == ("rollout/reward", [1, 3], [0.1, 0.5])
    assert curve.evals == {"math": ([0, 3], [0.2, 0.6])}
    assert curve_of([{"step": 1, "train/loss": 2.0}]).metric == "train/loss"


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert smooth([3.0] * 20) == pytest.approx([3.0] * 20)
    assert smooth([]) == []
    line = smooth([float(i) for i in range(100)])
    assert line[50] == pytest.approx(50, abs=0.6)
    # By hand: span 5 gives decay 2/3; forward [0, 3/5], backward [2/5, 1] for the values 0, 1.
    assert smooth([0.0, 1.0]) == pytest.approx([(0 + 2 / 5) / 2, (3 / 5 + 1) / 2])


def test_the_picture_is_a_png_of_one_or_several_runs(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    one = plot_reward(first, tmp_path / "deep" / "one.png")
    both = plot_reward([first, str(second)], tmp_path / "both.png")
    for path in (one, both):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert plot_reward(write_run(tmp_path / "c", []), tmp_path / "none.png") is None
    assert plot_curves([], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plot_reward(tmp_path, tmp_path / "none.png")


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [-1e9, 1e9], [math.nan, 1.0, math.inf], [i / 300 for i in range(300)]],
    ids=["one", "constant", "huge", "not finite", "many"],
)
def test_a_terminal_plot_fits_its_width_and_has_no_control_characters(values, width):
    text = terminal_plot(values, width=width)
    assert max(map(len, text.splitlines())) <= max(width, 50)
    assert len(text.splitlines()) == 18
    assert "\x1b" not in text and "nan" not in text


def test_a_rising_curve_rises_on_the_terminal():
    rows = terminal_plot([float(i) for i in range(50)], height=10).splitlines()[1:11]
    firsts = [
        min(i for i, c in enumerate(row[7:]) if c not in " ·") for row in rows if row[7:].strip()
    ]
    assert firsts == sorted(firsts, reverse=True)
    assert rows[0].startswith(" 49.0 ┤") or rows[0].startswith("49.0 ┤")


def test_nothing_to_draw_is_said():
    assert terminal_plot([], title="reward") == "reward: nothing to draw yet"
    assert terminal_plot([math.nan]) == "reward: nothing to draw yet"


def test_the_plot_of_a_run_marks_its_evaluations(tmp_path):
    text = plot_run(write_run(tmp_path / "demo"))
    assert text.startswith("reward of demo")
    assert "o eval" in text and "".join(text.splitlines()[1:-2]).count("o") == 2
    assert text.splitlines()[-1].split() == ["0", "step", "3"]
