"""Agents, masks, processing, losses, rewards, evaluation, traces."""

from __future__ import annotations

from dovetail.compat.row import Alias

_MODULES = "dovetail.compat.modules"
_REWARDS = f"{_MODULES}.rm_hub"

ALIASES: tuple[Alias, ...] = (
    Alias(f"{_MODULES}.trace", ("utils.trace_utils", "observability.trace_utils")),
    Alias(_REWARDS, ("rollout.rm_hub",)),
    Alias(f"{_REWARDS}.math_utils", ("rollout.rm_hub.math_utils",)),
    Alias(f"{_REWARDS}.math_dapo_utils", ("rollout.rm_hub.math_dapo_utils",)),
    Alias(f"{_REWARDS}.deepscaler", ("rollout.rm_hub.deepscaler",)),
    Alias(f"{_REWARDS}.f1", ("rollout.rm_hub.f1",)),
    Alias(f"{_REWARDS}.gpqa", ("rollout.rm_hub.gpqa",)),
    Alias(f"{_MODULES}.mask", ("utils.mask_utils",)),
    Alias(f"{_MODULES}.processing", ("utils.processing_utils",)),
)
