"""Advantage, loss and KL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class AlgorithmConfig(Section):
    """Advantage, loss and KL."""

    loss_type: str = Field(
        "policy_loss",
        description="policy_loss, sft_loss, distillation_loss (to opd_teacher_load), or "
        "custom_loss (custom_loss_function_path).",
    )
    advantage_estimator: str = Field("grpo", description="Row of the advantage table.")
    grpo_std_normalization: bool = Field(
        True, description="Divide group-centred rewards by the group's standard deviation."
    )
    rewards_normalization: bool = Field(True, description="Centre rewards on their group.")
    normalize_advantages: bool | None = Field(
        None,
        description="Whiten advantages over all trained tokens of the rollout; default: as the "
        "estimator's paper has it (reinforce_plus_plus and its baseline form: yes).",
    )
    gamma: float = Field(
        1.0, gt=0, le=1, description="Discount per token (ppo, reinforce_plus_plus)."
    )
    lambd: float = Field(1.0, ge=0, le=1, description="Lambda of generalised advantages (ppo).")
    policy_objective: Literal["clip", "gspo", "cispo"] | None = Field(
        None,
        description="What the policy loss does with the ratio: clip each token's, clip the whole "
        "sequence's (gspo), or weigh by the clipped one (cispo); default: the estimator's own.",
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
    use_unbiased_kl: bool = Field(
        False,
        description="Weigh the KL loss by the policy's ratio, so that its gradient is unbiased.",
    )
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL penalty inside the reward.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    calculate_per_token_loss: bool = Field(
        False,
        description="Mean over tokens of the step instead of mean over samples of token means.",
    )
    loss_reduction: Literal["rollout_mean", "token_mean", "constant"] | None = Field(
        None,
        description="Mean over rollouts of their token means, mean over tokens, or sum over tokens "
        "per rollout and loss_divisor; default: the estimator's own (dr_grpo: constant).",
    )
    loss_divisor: int | None = Field(
        None,
        ge=1,
        description="Tokens that a rollout's loss is divided by under loss_reduction constant; "
        "default: rollout_max_response_len.",
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
    tis_scope: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description="What use_tis takes the ratio of: each token, the whole sequence, or its "
        "geometric mean per token.",
    )
    tis_outside: Literal["clip", "mask"] = Field(
        "clip",
        description="What use_tis does with ratios outside tis_clip_low..tis_clip: bound them "
        "(truncated importance sampling), or leave their tokens out (IcePop).",
    )
    rejection_scope: Literal["token", "sequence", "geometric"] | None = Field(
        None,
        description="Leave tokens or whole sequences out whose ratio is outside "
        "rejection_clip_low..rejection_clip (masked importance sampling); default: none.",
    )
    rejection_clip: float = Field(2.0, gt=0, description="Upper bound of rejection_scope.")
    rejection_clip_low: float = Field(0.0, ge=0, description="Lower bound of rejection_scope.")
    veto_threshold: float | None = Field(
        None,
        gt=0,
        description="Leave whole sequences out that have a token with a ratio under this.",
    )
    use_decoupled_loss: bool = Field(
        False,
        description="Decoupled PPO: clip against the weights before this rollout's training, weigh "
        "by their ratio to those that sampled.",
    )
    behav_imp_weight_cap: float | None = Field(
        None,
        gt=1,
        description="Leave tokens out whose weight under use_decoupled_loss is above this.",
    )
    use_opsm: bool = Field(
        False,
        description="Leave sequences with a negative advantage out that the policy has moved away "
        "from by more than opsm_delta.",
    )
    opsm_delta: float = Field(
        1e-4, ge=0, description="Mean of old minus new logprob that use_opsm allows."
    )
    use_opd: bool = Field(
        False, description="Take opd_kl_coef x the reverse KL to a teacher off the advantages."
    )
    opd_kl_coef: float = Field(1.0, ge=0, description="Weight of the KL to the teacher.")
    distillation_beta: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Generalised Jensen-Shannon divergence of distillation_loss: 0 is the forward "
        "KL to the teacher, 1 the reverse.",
    )
    distillation_top_k: int = Field(
        0,
        ge=0,
        description="Outcomes of distillation_loss: the teacher's most probable tokens and the "
        "rest as one; 0: the whole vocabulary.",
    )
    use_routing_replay: bool = Field(
        False,
        description="Mixture-of-experts models: train each token through the experts that it went "
        "to when its old logprob was computed.",
    )
    use_rollout_routing_replay: bool = Field(
        False,
        description="Mixture-of-experts models: train each token through the experts that the "
        "engine sent it to when it was sampled; goes before use_routing_replay.",
    )
    get_mismatch_metrics: bool = Field(
        False, description="Measure as under use_tis; built-in corrections then change nothing."
    )

    @property
    def objective(self) -> str:
        """policy_objective, or the estimator's own: clip, gspo or cispo."""
        own = self.advantage_estimator if self.advantage_estimator in ("gspo", "cispo") else "clip"
        return self.policy_objective or own

    @property
    def reduction(self) -> str:
        """loss_reduction, or the estimator's own: rollout_mean, token_mean or constant."""
        if self.loss_reduction is not None:
            return self.loss_reduction
        if self.calculate_per_token_loss:
            return "token_mean"
        return "constant" if self.advantage_estimator == "dr_grpo" else "rollout_mean"

    @property
    def per_token(self) -> bool:
        """Whether the loss is a mean over the tokens of the step."""
        return self.reduction == "token_mean"

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its sequence."""
        return self.objective == "gspo" or self.use_opsm

    @property
    def corrects(self) -> bool:
        """Whether engine and trainer are compared token by token inside the policy loss."""
        return self.use_tis or self.get_mismatch_metrics or self.use_decoupled_loss

    @property
    def routing_replay(self) -> str | None:
        """The setting that says which experts are replayed, if one does."""
        leaves = ("use_rollout_routing_replay", "use_routing_replay")
        return next((leaf for leaf in leaves if getattr(self, leaf)), None)

    @property
    def needs_reference(self) -> bool:
        """Whether a KL to a frozen reference is measured."""
        return self.estimates and (self.use_kl_loss or self.kl_coef > 0)

    @property
    def estimates(self) -> bool:
        """Whether the loss reads advantages."""
        return self.loss_type not in ("sft_loss", "distillation_loss")
