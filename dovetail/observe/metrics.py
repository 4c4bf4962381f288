"""Values that merge: what ranks, workers and micro-batches each measured becomes one number.

A mean is kept as sum and weight until the end, so merging parts of different sizes gives the mean
of the whole; a plain average of averages would not.

Example:
    >>> merge([{"loss": Mean(6.0, 3)}, {"loss": Mean(1.0, 1), "tokens": Sum(5)}])["loss"].value
    1.75
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, Self, runtime_checkable


@runtime_checkable
class Value(Protocol):
    """A measurement that can be merged with others of its kind."""

    @property
    def value(self) -> float:
        """The number to show."""
        ...

    def merged(self, other: Self) -> Self:
        """This and `other` as one measurement."""
        ...


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, as the sum of `weight * x` and the sum of weights."""

    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        """Sum over weight; NaN without any weight."""
        return self.total / self.weight if self.weight else math.nan

    def merged(self, other: Mean) -> Mean:
        """Sums and weights add up."""
        return Mean(self.total + other.total, self.weight + other.weight)


@dataclass(frozen=True, slots=True)
class Sum:
    """A count or a total."""

    value: float

    def merged(self, other: Sum) -> Sum:
        """Totals add up."""
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest; NaN is larger than all, so it is never lost."""

    value: float

    def merged(self, other: Max) -> Max:
        """The larger of both."""
        return Max(math.nan if _lost(self, other) else max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest; NaN is smaller than all, so it is never lost."""

    value: float

    def merged(self, other: Min) -> Min:
        """The smaller of both."""
        return Min(math.nan if _lost(self, other) else min(self.value, other.value))


_KINDS: dict[str, type] = {"mean": Mean, "sum": Sum, "max": Max, "min": Min}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def merge(parts: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """One measurement per name out of those of every part; a name need not be in all of them.

    Raises:
        TypeError: two parts measured the same name in different ways.
    """
    merged: dict[str, Value] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif type(merged[name]) is type(value):
                merged[name] = merged[name].merged(value)
            else:
                kinds = f"{type(merged[name]).__name__} and {type(value).__name__}"
                raise TypeError(
                    f"metric '{name}' can't be merged: it is {kinds} in different parts"
                )
    return merged


def numbers(values: Mapping[str, Value | float]) -> dict[str, float]:
    """The number to show for each name; plain numbers pass through."""
    return {
        name: float(value if isinstance(value, int | float) else value.value)
        for name, value in values.items()
    }


def to_plain(values: Mapping[str, Value]) -> dict[str, list[str | float]]:
    """JSON-able form, for another process: `{"loss": ["mean", 6.0, 3.0]}`."""
    plain: dict[str, list[str | float]] = {}
    for name, value in values.items():
        numbers = [getattr(value, slot.name) for slot in fields(value)]  # type: ignore[arg-type]
        plain[name] = [_NAMES[type(value)], *numbers]
    return plain


def from_plain(plain: Mapping[str, list[str | float]]) -> dict[str, Value]:
    """Inverse of `to_plain`.

    Raises:
        ValueError: an entry is no measurement.
    """
    values: dict[str, Value] = {}
    for name, entry in plain.items():
        try:
            kind, *rest = entry
            values[name] = _KINDS[str(kind)](*(float(field) for field in rest))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"metric '{name}' is no measurement: {entry!r}") from error
    return values


def _lost(a: Max | Min, b: Max | Min) -> bool:
    return math.isnan(a.value) or math.isnan(b.value)
