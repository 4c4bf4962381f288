"""How long responses are: distributions that a simulation draws groups from.

Siblings of one prompt resemble each other, so part of the spread is the prompt's. The lengths of a
group depend on (seed, number of the group) alone: every way of running gets the same groups.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Lengths(Protocol):
    """Draws the responses of one group."""

    def group(self, rng: random.Random, size: int) -> list[int]:
        """Tokens of each of `size` siblings, at least 1."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """exp(normal), cut at `limit`, where `within` of the variance is between siblings."""

    median: float
    sigma: float
    limit: int
    within: float = 0.5

    def group(self, rng: random.Random, size: int) -> list[int]:
        """See `Lengths`."""
        center = rng.gauss(math.log(self.median), self.sigma * math.sqrt(1 - self.within))
        spread = self.sigma * math.sqrt(self.within)
        drawn = (math.exp(rng.gauss(center, spread)) for _ in range(size))
        return [max(1, min(self.limit, round(length))) for length in drawn]


@dataclass(frozen=True)
class LongTail:
    """Geometric with a mean of `short` tokens; of `share` of the groups every sibling runs to the
    limit."""

    short: float
    share: float
    limit: int

    def group(self, rng: random.Random, size: int) -> list[int]:
        """See `Lengths`."""
        if rng.random() < self.share:
            return [self.limit] * size
        drawn = (1 + int(rng.expovariate(1 / max(1e-9, self.short - 1))) for _ in range(size))
        return [min(self.limit, length) for length in drawn]


@dataclass(frozen=True)
class Fixed:
    """All the same."""

    tokens: int

    def group(self, rng: random.Random, size: int) -> list[int]:
        """See `Lengths`."""
        return [self.tokens] * size


@dataclass(frozen=True)
class Recorded:
    """Groups of a run, drawn with replacement; of siblings too, where another number is wanted."""

    groups: Sequence[Sequence[int]]

    def group(self, rng: random.Random, size: int) -> list[int]:
        """See `Lengths`."""
        found = rng.choice(self.groups)
        return list(found) if len(found) == size else rng.choices(found, k=size)

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """From a file of samples (JSONL with `group_index` and `response_length`) or a directory
        of them, as a run leaves in its `samples/`."""
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        groups: dict[tuple[str, int], list[int]] = {}
        for file in files:
            for line in file.read_text(encoding="utf-8").splitlines():
                sample = json.loads(line)
                key = (file.name, int(sample["group_index"]))
                groups.setdefault(key, []).append(max(1, int(sample["response_length"])))
        if not groups:
            raise SystemExit(f"{path} has no samples; expected JSONL as in a run's samples/")
        return cls(tuple(map(tuple, groups.values())))


def lengths_of(text: str) -> Lengths:
    """`lognormal:MEDIAN,SIGMA,LIMIT`, `longtail:SHORT,SHARE,LIMIT`, `fixed:TOKENS` or a path."""
    kind, _, rest = text.partition(":")
    known = {"lognormal": (LogNormal, 3), "longtail": (LongTail, 3), "fixed": (Fixed, 1)}
    if kind not in known:
        if not Path(text).exists():
            raise SystemExit(
                f"lengths '{text}': expected lognormal:MEDIAN,SIGMA,LIMIT, "
                "longtail:SHORT,SHARE,LIMIT, fixed:TOKENS, or a file or directory of samples"
            )
        return Recorded.read(Path(text))
    make, count = known[kind]
    try:
        numbers = [float(part) for part in rest.split(",")]
        *first, last = numbers
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} numbers")
    except ValueError as error:
        raise SystemExit(f"lengths '{text}': {kind} takes {count} numbers ({error})") from error
    return make(*first, int(last))  # type: ignore[no-any-return]
