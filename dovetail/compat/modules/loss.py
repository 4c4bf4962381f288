"""`backends.megatron_utils.loss`, `backends.training_utils.loss`: what custom losses build on."""

from dovetail.algorithms.packed_logits import (
    get_log_probs_and_entropy,
    get_responses,
    get_sum_of_sample_mean,
)
from dovetail.compat.modules.corrections import icepop_function, vanilla_tis_function
from dovetail.compat.modules.cp import all_gather_with_cp, slice_log_prob_with_cp
from dovetail.compat.modules.ppo import (
    compute_approx_kl,
    compute_gspo_kl,
    compute_policy_loss,
)

__all__ = [
    "all_gather_with_cp",
    "compute_approx_kl",
    "compute_gspo_kl",
    "compute_policy_loss",
    "get_log_probs_and_entropy",
    "get_responses",
    "get_sum_of_sample_mean",
    "icepop_function",
    "slice_log_prob_with_cp",
    "vanilla_tis_function",
]
