"""Progress: aligned lines everywhere, bars only on a terminal."""

import io
import re

import pytest
from rich.console import Console

from dovetail.observe.numbers import compact, duration
from dovetail.observe.progress import (
    PlainProgress,
    Progress,
    RichProgress,
    eval_line,
    eval_sets,
    make_progress,
    step_line,
)

METRICS = {
    "rollout/reward": 0.4378,
    "rollout/response_length": 23.44,
    "train/loss": 0.01,
    "train/kl": 0.00123,
    "train/entropy": 1.031,
    "train/grad_norm": 0.5213,
    "perf/rollout_tokens_per_s": 4312.0,
    "time/step_s": 2.141,
    "time/rollout_s": 1.2,
    "time/train_s": 0.9,
    "time/publish_s": 0.00001,
}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.4378, "0.438"),
        (-0.4378, "-0.438"),
        (1.0, "1.00"),
        (0.99999, "1.00"),
        (9.999, "10.0"),
        (23.44, "23.4"),
        (99.96, "100"),
        (999.7, "1.00k"),
        (4312, "4.31k"),
        (12_345_678, "12.3M"),
        (7e9, "7.00G"),
        (0.00123, "0.0012"),
        (0.000123, "1.2e-4"),
        (3e20, "3.0e20"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_short(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00s"),
        (2.14, "2.14s"),
        (12.34, "12.3s"),
        (119.9, "2m00s"),
        (245, "4m05s"),
        (7650, "2h07m"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_a_step_is_one_line_with_everything_a_person_asks_for():
    assert step_line(12, 100, METRICS) == (
        "step  12/100  reward  0.438  len   23.4  kl 0.0012  ent   1.03  grad  0.521   4.31k tok/s"
        "   2.14s (rollout 1.20, train 0.90)"
    )


def test_lines_of_different_steps_are_aligned():
    other = {**METRICS, "rollout/reward": -1.0, "train/kl": 12.0, "train/grad_norm": 1234.5}
    first, second = step_line(1, 100, METRICS), step_line(100, 100, other)
    for label in ("reward", "len", "kl", "ent", "grad", "tok/s"):
        assert first.index(label) == second.index(label)


def test_troubles_are_named_only_when_there_are_any():
    metrics = {**METRICS, "rollout/truncated": 0.05, "train/skipped_steps": 0.0}
    line = step_line(1, None, metrics)
    assert line.endswith("truncated 5%") and "skipped" not in line


def test_supervised_steps_show_the_loss():
    line = step_line(3, 10, {"train/loss": 1.25, "perf/train_tokens_per_s": 10.0})
    assert line == "step  3/10  loss   1.25    10.0 tok/s"


def test_each_evaluation_set_has_its_own_line():
    metrics = {
        "eval/math/reward": 0.5,
        "eval/math/pass@4": 0.8,
        "eval/math/truncated": 0.0,
        "eval/a/b/reward": 0.25,
        "eval/time_s": 3.0,
        "rollout/reward": 1.0,
    }
    sets = eval_sets(metrics)
    assert list(sets) == ["math", "a/b"]
    assert eval_line(2, 10, "math", sets["math"]) == (
        "eval  2/10  math  reward  0.500  pass@4  0.800"
    )


def test_plain_progress_is_lines_only_and_says_something_in_long_phases():
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(100, stream, clock=lambda: now[0])
    progress.rollout(1, 8, 50)
    assert stream.getvalue() == ""
    now[0] = 31.0
    progress.rollout(2, 8, 100)
    progress.rollout(3, 8, 150)
    progress.step(1, METRICS)
    now[0] = 90.0
    progress.train(4, 8)
    progress.evaluated(1, {"eval/x/reward": 1.0})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  ... step   1/100: rollout 2/8 groups, 100 tokens"
    assert lines[1].startswith("step   1/100  reward")
    assert lines[2] == "  ... step   2/100: train 4/8 samples"
    assert lines[3] == "eval   1/100  x  reward   1.00"
    assert len(lines) == 4 and "\x1b" not in stream.getvalue()


def test_a_resumed_run_counts_on():
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(100, stream, clock=lambda: now[0])
    progress.resumed(40)
    now[0] = 31.0
    progress.rollout(2, 8, 100)
    assert stream.getvalue().splitlines() == [
        "resumed after step 40",
        "  ... step  41/100: rollout 2/8 groups, 100 tokens",
    ]
    bars = RichProgress(100, Console(file=stream, width=150))
    bars.resumed(40)
    assert bars._bars.tasks[0].completed == 40
    bars.close()


def test_bars_leave_the_lines_and_a_visible_cursor():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=150, highlight=False)
    progress = RichProgress(3, console)
    progress.rollout(0, 4)
    progress.rollout(4, 4, 1000)
    progress._bars.refresh()
    progress.train(1, 8)
    progress._bars.refresh()
    progress.step(1, METRICS)
    progress.say("[bold]as it is[/bold]")
    progress.evaluation(1, 2)
    progress.evaluated(1, {"eval/x/reward": 1.0})
    progress.close()
    progress.close()
    progress.rollout(1, 2)
    raw = stream.getvalue()
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw)
    assert step_line(1, 3, METRICS) in text
    assert "[bold]as it is[/bold]" in text
    assert "4/4 groups 1.00k tok" in text and "1/8 samples" in text


def test_the_display_follows_the_mode_and_the_terminal(monkeypatch, capsys):
    assert type(make_progress("auto")) is PlainProgress
    assert type(make_progress("plain")) is PlainProgress
    assert type(make_progress("off")) is Progress
    assert type(make_progress("rich")) is RichProgress
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert type(make_progress("auto")) is RichProgress
    silent = make_progress("off", 3)
    silent.step(1, METRICS)
    silent.say("x")
    silent.close()
    assert capsys.readouterr().out == ""
