"""The user's functions inside Megatron's training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INIT = "custom_megatron_init"
BEFORE_LOGPROBS = "custom_megatron_before_log_prob_hook"
BEFORE_STEP = "custom_megatron_before_train_step_hook"
PROVIDER = "custom_model_provider"


@dataclass(frozen=True, slots=True)
class MegatronHooks:
    """None: there is none."""

    init: Callable[[], Any] | None = None
    """On every rank, after Megatron's groups are there."""
    before_logprobs: Callable[[list[Any], str], Any] | None = None
    """`(model, store_prefix)` before a pass without gradients, in eval mode; "" is the policy,
    "ref_" the reference."""
    before_step: Callable[[int, int, list[Any], Any, Any], Any] | None = None
    """`(rollout_id, step_id, model, optimizer, opt_param_scheduler)` before the passes of an
    optimizer step, gradients being zero."""
    provider: Callable[..., Any] | None = None
    """`(pre_process=, post_process=, vp_stage=, config=, pg_collection=)` -> the module of a
    stage."""


def megatron_hooks(bound: dict[str, Any]) -> MegatronHooks:
    """Those of a run's bound hooks."""
    return MegatronHooks(
        bound.get(INIT), bound.get(BEFORE_LOGPROBS), bound.get(BEFORE_STEP), bound.get(PROVIDER)
    )
