"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, or nothing.

One line per step, aligned under the one before:

    step  12/100  reward 0.438  len  23.4  kl 0.0012  ent  1.03  grad 0.521  4.31k tok/s  2.14s: ...
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from dovetail.observe.numbers import compact, duration

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 6
_CELLS = (
    ("reward", ("rollout/reward",)),
    ("len", ("rollout/response_length",)),
    ("loss", ("train/loss",)),
    ("kl", ("train/kl",)),
    ("ent", ("train/entropy",)),
    ("grad", ("train/grad_norm",)),
    ("tok/s", ("perf/rollout_tokens_per_s", "perf/train_tokens_per_s")),
)
"""Label, and the metrics it may come from, first found."""
_WHEN_NOT_ZERO = (
    ("truncated", "rollout/truncated", "{:.0%}"),
    ("dropped groups", "rollout/dropped_groups", "{:.0f}"),
    ("removed samples", "rollout/removed_samples", "{:.0f}"),
    ("skipped updates", "train/skipped_steps", "{:.0f}"),
    ("skipped updates of the critic", "train/critic_skipped_steps", "{:.0f}"),
)
_PARTS = "/reward_parts"
"""Below it are the terms of a weighted reward."""
_PLAIN_EVERY_S = 30.0
"""Seconds between lines about a phase that takes long, where there are no bars."""


def step_line(done: int, total: int | None, metrics: Mapping[str, float]) -> str:
    """One step in one line: reward, length, KL, entropy, gradient norm, speed, seconds."""
    cells = [_counter("step", done, total)]
    for label, names in _CELLS:
        found = next((metrics[name] for name in names if name in metrics), None)
        # A policy loss says nothing to a person; it is shown where there is no reward (SFT).
        if found is None or (label == "loss" and "rollout/reward" in metrics):
            continue
        text = compact(found).rjust(_WIDTH)
        cells.append(f"{text} {label}" if label == "tok/s" else f"{label} {text}")
    cells.append(_seconds(metrics))
    for label, name, form in _WHEN_NOT_ZERO:
        if metrics.get(name):
            cells.append(f"{label} {form.format(metrics[name])}")
    return "  ".join(cell for cell in cells if cell)


def eval_line(done: int, total: int | None, name: str, metrics: Mapping[str, float]) -> str:
    """One evaluation set in one line; `metrics` without the prefix `eval/<name>/`.

    Of pass@k and maj@k the greatest k is shown, and pass@1 where it is not the reward; the number
    after ± is half the length of the 95 % confidence interval.
    """
    cells = [_counter("eval", done, total), name]
    if "reward" in metrics:
        of_mean = next((key for key in metrics if re.fullmatch(r"mean@\d+", key)), "")
        cells.append(f"reward {_with_margin(metrics, 'reward', of_mean)}")
    for key in _shown(metrics):
        cells.append(f"{key} {_with_margin(metrics, key, key)}")
    if "response_length" in metrics:
        cells.append(f"len {compact(metrics['response_length']).rjust(_WIDTH)}")
    if metrics.get("truncated"):
        cells.append(f"truncated {metrics['truncated']:.0%}")
    for key in ("failed", "reward_failed"):
        if metrics.get(key):
            cells.append(f"{key} {compact(metrics[key]).rjust(_WIDTH)}")
    return "  ".join(cells)


def _shown(metrics: Mapping[str, float]) -> list[str]:
    """The statistics of a set that its line has room for."""
    shown = []
    for kind in ("pass", "maj"):
        ks = [int(key.partition("@")[2]) for key in metrics if re.fullmatch(rf"{kind}@\d+", key)]
        if 1 in ks and abs(metrics[f"{kind}@1"] - metrics.get("reward", math.inf)) > 1e-9:
            shown.append(f"{kind}@1")
        if ks and max(ks) > 1:
            shown.append(f"{kind}@{max(ks)}")
    return shown


def _with_margin(metrics: Mapping[str, float], key: str, of: str) -> str:
    low, high = metrics.get(f"{of}_ci_low"), metrics.get(f"{of}_ci_high")
    text = compact(metrics[key]).rjust(_WIDTH)
    return text if low is None or high is None else f"{text} ±{compact((high - low) / 2)}"


def _counter(what: str, done: int, total: int | None) -> str:
    if total is None:
        return f"{what} {done:>4d}"
    return f"{what} {done:>{len(str(total))}d}/{total}"


def _seconds(metrics: Mapping[str, float]) -> str:
    if "time/step_s" not in metrics:
        return ""
    phases = [
        f"{name.removeprefix('time/').removesuffix('_s')} {value:.{2 if value < 9.995 else 1}f}"
        for name, value in metrics.items()
        if name.startswith("time/") and name != "time/step_s" and value >= 0.005
    ]
    whole = duration(metrics["time/step_s"]).rjust(_WIDTH)
    return f"{whole} ({', '.join(phases)})" if phases else whole


def eval_sets(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`eval/<set>/<metric>` as a table per set, in order of appearance."""
    sets: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/") and name.count("/") >= 2:
            one, _, metric = name.removeprefix("eval/").rpartition("/")
            if one.endswith(_PARTS):
                one, metric = one.removesuffix(_PARTS), f"{_PARTS[1:]}/{metric}"
            sets.setdefault(one, {})[metric] = value
    return sets


class Progress:
    """Shows nothing; the base of what shows something."""

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = total_steps

    def resumed(self, done: int) -> None:
        """The run goes on after this many steps."""

    def rollout(self, done: int, total: int, tokens: int = 0) -> None:
        """`done` of `total` groups of this step are there, with `tokens` response tokens."""

    def train(self, done: int, total: int) -> None:
        """`done` of `total` samples of this step are trained on."""

    def evaluation(self, done: int, total: int, tokens: int = 0) -> None:
        """`done` of `total` groups of the evaluation are there."""

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """A step is finished: `done` of them are."""

    def evaluated(self, done: int, metrics: Mapping[str, float]) -> None:
        """An evaluation after `done` steps is finished; metrics are `eval/<set>/<metric>`."""

    def say(self, text: str) -> None:
        """Show one line of text."""

    def close(self) -> None:
        """Leave the terminal as it was. A second call does nothing."""


class PlainProgress(Progress):
    """Lines only, flushed one by one: for pipes, files and `--progress plain`."""

    def __init__(
        self,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(total_steps)
        self._stream, self._clock = stream, clock
        self._quiet_until = clock() + _PLAIN_EVERY_S
        self._done = 0

    def resumed(self, done: int) -> None:
        self._done = done
        self.say(f"resumed after step {done}")

    def rollout(self, done: int, total: int, tokens: int = 0) -> None:
        self._sometimes(done, total, f"rollout {done}/{total} groups, {compact(tokens)} tokens")

    def train(self, done: int, total: int) -> None:
        self._sometimes(done, total, f"train {done}/{total} samples")

    def evaluation(self, done: int, total: int, tokens: int = 0) -> None:
        self._sometimes(done, total, f"eval {done}/{total} groups, {compact(tokens)} tokens")

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self._done = done
        self.say(step_line(done, self.total_steps, metrics))

    def evaluated(self, done: int, metrics: Mapping[str, float]) -> None:
        for name, one in eval_sets(metrics).items():
            self.say(eval_line(done, self.total_steps, name, one))

    def say(self, text: str) -> None:
        self._quiet_until = self._clock() + _PLAIN_EVERY_S
        print(text, file=self._stream or sys.stdout, flush=True)

    def _sometimes(self, done: int, total: int, text: str) -> None:
        if done < total and self._clock() >= self._quiet_until:
            self.say(f"  ... {_counter('step', self._done + 1, self.total_steps)}: {text}")


class RichProgress(Progress):
    """Two bars at the bottom of a terminal, the run and its current phase, and lines above them."""

    def __init__(self, total_steps: int | None = None, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        super().__init__(total_steps)
        self._console = console or Console(highlight=False)
        self._bars = Bars(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]:<24}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            refresh_per_second=5,
        )
        self._run = self._bars.add_task("run", total=total_steps, count=self._steps(0))
        self._phase: Any = None
        self._phase_name = ""
        self._started = self._closed = False

    def resumed(self, done: int) -> None:
        self._bars.update(self._run, completed=done, count=self._steps(done))
        self.say(f"resumed after step {done}")

    def rollout(self, done: int, total: int, tokens: int = 0) -> None:
        self._show("rollout", done, total, f"{done}/{total} groups {compact(tokens)} tok")

    def train(self, done: int, total: int) -> None:
        self._show("train", done, total, f"{done}/{total} samples")

    def evaluation(self, done: int, total: int, tokens: int = 0) -> None:
        self._show("eval", done, total, f"{done}/{total} groups {compact(tokens)} tok")

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        self._bars.update(self._run, completed=done, count=self._steps(done))
        self._end_phase()
        self._console.print(_styled(step_line(done, self.total_steps, metrics)), soft_wrap=True)

    def evaluated(self, done: int, metrics: Mapping[str, float]) -> None:
        self._end_phase()
        for name, one in eval_sets(metrics).items():
            line = eval_line(done, self.total_steps, name, one)
            self._console.print(_styled(line, "bold green"), soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._started and not self._closed:
            self._bars.stop()
        self._closed = True

    def _steps(self, done: int) -> str:
        return f"{done} steps" if self.total_steps is None else f"{done}/{self.total_steps} steps"

    def _show(self, name: str, done: int, total: int, count: str) -> None:
        if self._closed:
            return
        if not self._started:
            self._started = True
            self._bars.start()
            # A run that is ended at once (second SIGINT) could not bring a hidden cursor back.
            self._console.show_cursor(True)
        if self._phase is None or self._phase_name != name:
            self._end_phase()
            self._phase_name = name
            self._phase = self._bars.add_task(name, total=total, count=count)
        self._bars.update(self._phase, completed=done, total=total, count=count)

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._bars.remove_task(self._phase)
            self._phase = None


def make_progress(mode: str, total_steps: int | None = None) -> Progress:
    """The display for `mode`: auto, rich, plain or off. auto is rich on a terminal, else plain."""
    if mode == "off":
        return Progress(total_steps)
    if mode == "rich" or (mode == "auto" and _is_terminal(sys.stdout)):
        return RichProgress(total_steps)
    return PlainProgress(total_steps)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _styled(line: str, head: str = "bold cyan") -> Any:
    """The line with its labels dim, so that the numbers stand out."""
    from rich.text import Text

    text = Text(line)
    for label, _ in _CELLS:
        text.highlight_words([f"  {label} ", f" {label}  "], "dim")
    text.highlight_regex(r"^\w+ +\d+(/\d+)?", head)
    text.highlight_regex(r"\(.*\)", "dim")
    return text
