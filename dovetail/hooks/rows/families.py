"""Words that many rows use."""

from __future__ import annotations

ALL = ("native", "slime", "vime", "miles")
FOREIGN = ("slime", "vime", "miles")
SLIME = ("slime", "vime")
MILES = ("native", "miles")

DOCUMENTED = "as their guides show it"
CALLED = "as it is called"
