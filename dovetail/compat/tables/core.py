"""Types, rollout functions, data sources, filters, and what surrounds them."""

from __future__ import annotations

from dovetail.compat.row import Alias

ALIASES: tuple[Alias, ...] = (Alias("dovetail.types.sample", ("utils.types",)),)
