"""Advantage, loss and KL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class AlgorithmConfig(Section):
    """Advantage, loss and KL."""

    loss_type: str = Field(
        "policy_loss",
        description="policy_loss, sft_loss, or custom_loss (custom_loss_function_path).",
    )
    advantage_estimator: str = Field("grpo", description="Row of the advantage table.")
    grpo_std_normalization: bool = Field(
        True, description="Divide group-centred rewards by the group's standard deviation."
    )
    rewards_normalization: bool = Field(True, description="Centre rewards on their group.")
    normalize_advantages: bool = Field(
        False, description="Whiten advantages over all trained tokens of the step."
    )
    eps_clip: float = Field(0.2, ge=0, description="Lower clip of the policy ratio: 1 - eps_clip.")
    eps_clip_high: float | None = Field(
        None, ge=0, description="Upper clip: 1 + eps_clip_high; default: eps_clip."
    )
    eps_clip_c: float | None = Field(
        None, gt=1, description="Dual clip: bound of the ratio for negative advantages."
    )
    use_kl_loss: bool = Field(False, description="Add KL to the frozen reference to the loss.")
    kl_loss_coef: float = Field(0.0, ge=0, description="Weight of the KL loss.")
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = Field(
        "k1", description="Estimator of the KL loss."
    )
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL penalty inside the reward.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    calculate_per_token_loss: bool = Field(
        False,
        description="Mean over tokens of the step instead of mean over samples of token means.",
    )
    use_rollout_logprobs: bool = Field(
        False, description="The engine's logprobs are those of the old policy; no pass for them."
    )
    use_tis: bool = Field(
        False,
        description="Weigh the policy loss for tokens that the engine sampled with other odds than "
        "the trainer's: truncated importance sampling, or custom_tis_function_path.",
    )
    tis_clip: float = Field(2.0, gt=0, description="Upper bound of the weights of use_tis.")
    tis_clip_low: float = Field(0.0, ge=0, description="Lower bound of the weights of use_tis.")
    get_mismatch_metrics: bool = Field(
        False, description="Measure as under use_tis; built-in corrections then change nothing."
    )
