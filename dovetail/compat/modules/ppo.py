"""`utils.ppo_utils`; miles: `backends.training_utils.loss_hub.math_utils`."""

from dovetail.algorithms.family_ppo import (
    calculate_log_probs_and_entropy,
    chunked_gae,
    compute_approx_kl,
    compute_cispo_loss,
    compute_entropy_from_logits,
    compute_gspo_kl,
    compute_log_probs,
    compute_opsm_mask,
    compute_policy_loss,
    get_advantages_and_returns,
    get_advantages_and_returns_batch,
    get_grpo_returns,
    get_reinforce_plus_plus_baseline_advantages,
    get_reinforce_plus_plus_returns,
    vanilla_gae,
)

__all__ = [
    "calculate_log_probs_and_entropy",
    "chunked_gae",
    "compute_approx_kl",
    "compute_cispo_loss",
    "compute_entropy_from_logits",
    "compute_gspo_kl",
    "compute_log_probs",
    "compute_opsm_mask",
    "compute_policy_loss",
    "get_advantages_and_returns",
    "get_advantages_and_returns_batch",
    "get_grpo_returns",
    "get_reinforce_plus_plus_baseline_advantages",
    "get_reinforce_plus_plus_returns",
    "vanilla_gae",
]
