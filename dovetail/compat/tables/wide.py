"""Agents, masks, processing, losses, rewards, evaluation, traces."""

from __future__ import annotations

from dovetail.compat.row import MILES, SLIME, VIME, Alias

_BOTH = (SLIME, VIME)
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
    Alias(f"{_MODULES}.eval_config", ("utils.eval_config",)),
    Alias(f"{_MODULES}.processing", ("utils.processing_utils",)),
    Alias(f"{_MODULES}.ppo", ("utils.ppo_utils",)),
    Alias(f"{_MODULES}.ppo", ("backends.training_utils.loss_hub.math_utils",), (MILES,)),
    Alias(
        f"{_MODULES}.loss", ("backends.megatron_utils.loss", "backends.training_utils.loss"), _BOTH
    ),
    Alias(
        f"{_MODULES}.miles_loss",
        (
            "backends.megatron_utils.loss",
            "backends.training_utils.loss",
            "backends.training_utils.loss_hub.logit_processors",
            "backends.training_utils.loss_hub.logits",
            "backends.training_utils.loss_hub.losses",
        ),
        (MILES,),
    ),
    Alias(f"{_MODULES}.corrections", ("backends.training_utils.loss_hub.corrections",), (MILES,)),
    Alias(
        f"{_MODULES}.cp",
        ("backends.megatron_utils.cp_utils", "backends.training_utils.cp_utils"),
    ),
    Alias(f"{_MODULES}.commands", ("utils.external_utils.command_utils",)),
    *(
        Alias(f"dovetail.compat.{name}", (name,), _BOTH)
        for name in (
            "agent",
            "agent.adapters",
            "agent.adapters.anthropic",
            "agent.adapters.common",
            "agent.adapters.openai",
            "agent.aiohttp_threaded",
            "agent.harness",
            "agent.harness.claude_code",
            "agent.harness.codex",
            "agent.harness.common",
            "agent.parsing",
            "agent.sandbox",
        )
    ),
    Alias(
        "dovetail.compat.agent.trajectory", ("agent.trajectory", "agent.trajectory_manager"), _BOTH
    ),
)
