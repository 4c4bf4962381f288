"""Types, rollout functions, data sources, filters, and what surrounds them."""

from __future__ import annotations

from dovetail.compat.row import Alias

_MODULES = "dovetail.compat.modules"

ALIASES: tuple[Alias, ...] = (
    Alias("dovetail.types.sample", ("utils.types",)),
    Alias(f"{_MODULES}.base_types", ("rollout.base_types",)),
    Alias(f"{_MODULES}.filter_types", ("rollout.filter_hub.base_types",)),
    Alias(
        "dovetail.rollout.filters",
        (
            "rollout.filter_hub.dynamic_sampling_filters",
            "rollout.filter_hub.diversity_sampling_filters",
        ),
    ),
    Alias(f"{_MODULES}.misc", ("utils.misc",)),
    Alias(f"{_MODULES}.http", ("utils.http_utils",)),
    Alias(f"{_MODULES}.async_loop", ("utils.async_utils",)),
)
