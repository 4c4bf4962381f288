"""From single measured steps to medians, ratios and text. Pure functions; no side is needed to
test them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

OWN, PEER = "dovetail", "trl"
PAIRS = {
    "": ("default", "default"),
    "_same_dtype": ("float32", "float32"),
    "_vs_float32": ("default", "float32"),
    "_bfloat16": ("default", "bfloat16"),
}
"""Suffix of the result's keys -> precision of (ours, TRL's). Our default has bfloat16 weights and
float32 masters; `_same_dtype` is float32 on both sides, where both do the same arithmetic; TRL in
bfloat16 has no masters."""


@dataclass(frozen=True)
class Step:
    """One measured step of one side."""

    shape: str
    side: str
    precision: str
    turn: int
    """Counts rounds of turns; steps of the same turn and shape ran next to each other."""
    step_s: float
    rollout_s: float
    response_lens: tuple[int, ...]
    facts: Mapping[str, float]
    """loss, grad_norm, entropy, reward."""
    step_cpu_s: float
    """CPU seconds of all threads."""
    rollout_cpu_s: float

    @property
    def tokens(self) -> int:
        return sum(self.response_lens)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.rollout_s


@dataclass(frozen=True)
class Ratio:
    """How many times ours is better: median and range over the turns."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        return Ratio(median(values), min(values), max(values))


def _turns(steps: Iterable[Step], shape: str, side: str, precision: str) -> dict[int, Step]:
    return {
        step.turn: step
        for step in steps
        if (step.shape, step.side, step.precision) == (shape, side, precision)
    }


MEASURES: dict[str, Callable[[Step, Step], float]] = {
    "rollout_ratio": lambda ours, theirs: ours.tokens_per_s / theirs.tokens_per_s,
    "step_ratio": lambda ours, theirs: theirs.step_s / ours.step_s,
    "rollout_cpu_ratio": lambda ours, theirs: (
        (theirs.rollout_cpu_s / theirs.tokens) / (ours.rollout_cpu_s / ours.tokens)
    ),
    "step_cpu_ratio": lambda ours, theirs: theirs.step_cpu_s / ours.step_cpu_s,
}
"""How many times ours is better. Seconds on the clock are what a user waits; CPU seconds (of one
thread) hardly change when the machine is busy with other work."""


def ratios(steps: Sequence[Step], shape: str, pair: tuple[str, str]) -> dict[str, Ratio]:
    """Every measure over the turns that both sides had; empty if not measured."""
    ours = _turns(steps, shape, OWN, pair[0])
    theirs = _turns(steps, shape, PEER, pair[1])
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return {}
    return {
        name: Ratio.of([measure(ours[turn], theirs[turn]) for turn in both])
        for name, measure in MEASURES.items()
    }


def side_facts(steps: Sequence[Step], peak_rss_mb: float | None) -> dict[str, Any]:
    """Medians of one side's steps of one shape, and what its last step learned from."""
    last = max(steps, key=lambda step: step.turn)
    return {
        "rollout_tokens_per_s": median(step.tokens_per_s for step in steps),
        "rollout_s": median(step.rollout_s for step in steps),
        "step_s": median(step.step_s for step in steps),
        "step_s_range": [min(s.step_s for s in steps), max(s.step_s for s in steps)],
        "step_cpu_s": median(step.step_cpu_s for step in steps),
        "rollout_cpu_s": median(step.rollout_cpu_s for step in steps),
        "steps": len(steps),
        "response_tokens_per_step": [step.tokens for step in steps],
        "longest_response": max(max(step.response_lens) for step in steps),
        "peak_rss_mb": peak_rss_mb,
        "last": dict(last.facts),
    }


def result(
    steps: Sequence[Step],
    shapes: Sequence[str],
    peaks: Mapping[tuple[str, str, str], float],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole JSON document.

    Args:
        steps: measured steps, warm-up left out.
        shapes: their order in the document.
        peaks: (shape, side, precision) -> peak resident memory in MB.
        facts: what else is known of the run: versions, machine, settings.

    Returns:
        The names of `MEASURES`, `peak_memory_ratio` and the same with the suffixes of
        `PAIRS`, each by shape; `ranges` with [lowest, highest] of the ratios; `sides` with each
        side's own medians; `facts`.
    """
    document: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    for suffix, pair in PAIRS.items():
        for shape in shapes:
            for name, ratio in ratios(steps, shape, pair).items():
                document.setdefault(name + suffix, {})[shape] = ratio.median
                ranges.setdefault(name + suffix, {})[shape] = [ratio.low, ratio.high]
            ours, theirs = (shape, OWN, pair[0]), (shape, PEER, pair[1])
            if ours in peaks and theirs in peaks:
                memory = document.setdefault(f"peak_memory_ratio{suffix}", {})
                memory[shape] = peaks[theirs] / peaks[ours]
    document["ranges"] = ranges
    document["sides"] = {shape: {} for shape in shapes}
    for key in dict.fromkeys((s.shape, s.side, s.precision) for s in steps):
        own_steps = list(_turns(steps, *key).values())
        document["sides"][key[0]][f"{key[1]} {key[2]}"] = side_facts(own_steps, peaks.get(key))
    return {**document, **facts}


def text(document: Mapping[str, Any]) -> str:
    """The document as tables for a terminal."""
    lines = []
    for shape, sides in document["sides"].items():
        lines += ["", f"{shape}:"]
        lines.append(
            f"  {'side':<18}{'tokens/s':>10}{'rollout s':>11}{'step s':>9}{'peak MB':>9}"
            f"{'tokens':>8}{'longest':>9}{'loss':>10}{'grad norm':>11}{'entropy':>9}{'reward':>8}"
        )
        for name, side in sides.items():
            last = side["last"]
            lines.append(
                f"  {name:<18}{side['rollout_tokens_per_s']:>10.0f}{side['rollout_s']:>11.2f}"
                f"{side['step_s']:>9.2f}{side['peak_rss_mb'] or 0:>9.0f}"
                f"{median(side['response_tokens_per_step']):>8.0f}{side['longest_response']:>9}"
                f"{last['loss']:>10.1e}{last['grad_norm']:>11.3f}{last['entropy']:>9.3f}{last['reward']:>8.3f}"
            )
    lines += ["", "how many times better we are (median over the turns, [lowest, highest]):"]
    for key in (k for k in document if "_ratio" in k):
        cells = []
        for shape, value in document[key].items():
            span = document["ranges"].get(key, {}).get(shape)
            cells.append(
                f"{shape} {value:.2f}x" + (f" [{span[0]:.2f}, {span[1]:.2f}]" if span else "")
            )
        lines.append(f"  {key:<30}" + "   ".join(cells))
    return "\n".join(lines)
