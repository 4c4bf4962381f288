"""Numbers and durations for people: three figures, few characters."""

from __future__ import annotations

import math

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def compact(value: float) -> str:
    """`value` in at most seven characters: 0.438, 23.4, 4.31k, 1.2e-4, nan."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if size >= 1e15 or size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    for limit, unit in _UNITS:
        # 999.6 would be shown as 1000 without its unit.
        if size >= limit * 0.9995:
            return _three_figures(value / limit) + unit
    return _three_figures(value)


def duration(seconds: float) -> str:
    """`seconds` as 0.42s, 12.3s, 4m05s or 2h07m."""
    if seconds < 9.995:
        return f"{seconds:.2f}s"
    if seconds < 99.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _three_figures(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.00995 else f"{value:.4f}"
