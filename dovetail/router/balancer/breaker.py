"""Keeps requests away from an engine that fails again and again, and finds out when it is well.

closed --failures in a row--> open --after a while--> half open --success--> closed
                               ^                          |
                               +---------failure----------+   (each time twice as long)
"""

from __future__ import annotations

from enum import StrEnum

FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0


class BreakerState(StrEnum):
    """Whether requests pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One request at a time passes, to see."""


class Breaker:
    """Counts failures in a row. Times are those of the caller's clock, in seconds.

    Args:
        threshold: so many failures in a row open it.
    """

    __slots__ = ("_rest_s", "failures", "next_at", "state", "threshold")

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Closed, as new."""
        self.state = BreakerState.CLOSED
        self.failures = 0
        self.next_at = 0.0
        """When the next request may pass, unless closed."""
        self._rest_s = FIRST_REST_S

    def allows(self, now: float) -> bool:
        """Whether a request may pass now."""
        return self.state is BreakerState.CLOSED or now >= self.next_at

    def begin(self, now: float) -> None:
        """A request passes."""
        if self.state is not BreakerState.CLOSED:
            self.state = BreakerState.HALF_OPEN
            # An answer may take minutes: meanwhile more pass, one in each rest.
            self.next_at = now + self._rest_s

    def success(self) -> None:
        """The engine answered."""
        if self.failures:
            self.reset()

    def nothing(self) -> None:
        """A request ended without saying anything about the engine: another one may see."""
        if self.state is BreakerState.HALF_OPEN:
            self.next_at = 0.0

    def failure(self, now: float) -> bool:
        """The engine failed; whether that opened it. While it is open, late failures of earlier
        requests do not count."""
        if self.state is BreakerState.OPEN:
            return False
        self.failures += 1
        if self.failures < self.threshold:
            return False
        if self.state is BreakerState.HALF_OPEN:
            self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)
        self.state = BreakerState.OPEN
        self.next_at = now + self._rest_s
        return True
