"""Corrections for tokens that another distribution sampled than the one that is trained: the
engine's arithmetic, or older weights.

With `r = exp(train_logprob - rollout_logprob)` per token, both weigh the policy loss by r and
differ in what they do where r leaves `[tis_clip_low, tis_clip]`. Under get_mismatch_metrics without
use_tis they only measure.
"""

from __future__ import annotations

import torch

from dovetail.types.calls import CorrectionCall

Corrected = tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]
"""The policy loss per token, the loss masks to reduce it with, and metrics per token."""


def vanilla_tis_function(call: CorrectionCall) -> Corrected:
    """Truncated importance sampling: `loss * clamp(r, tis_clip_low, tis_clip)`.

    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    2025 (fengyao.notion.site/off-policy-rl), after E. Ionides, "Truncated importance sampling",
    2008.
    """
    ratio_N = _ratio(call)
    return _weighted(call, ratio_N, ratio_N.clamp(call.args.tis_clip_low, call.args.tis_clip))


def icepop_function(call: CorrectionCall) -> Corrected:
    """IcePop: `loss * r` where `tis_clip_low <= r <= tis_clip`, and 0 elsewhere.

    Source: "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model",
    arXiv 2510.18855, section on IcePop.
    """
    ratio_N = _ratio(call)
    kept_N = (ratio_N >= call.args.tis_clip_low) & (ratio_N <= call.args.tis_clip)
    return _weighted(call, ratio_N, torch.where(kept_N, ratio_N, 0.0))


def _ratio(call: CorrectionCall) -> torch.Tensor:
    train_N, rollout_N = torch.cat(call.train_log_probs), torch.cat(call.rollout_log_probs)
    return (train_N - rollout_N).exp().detach()


def _weighted(call: CorrectionCall, ratio_N: torch.Tensor, weights_N: torch.Tensor) -> Corrected:
    metrics = {
        "tis": ratio_N,
        "tis_clipfrac": (weights_N != ratio_N).float(),
        "tis_abs": (ratio_N - 1).abs(),
    }
    applied = getattr(call.args, "use_tis", True)
    return call.pg_loss * weights_N if applied else call.pg_loss, call.loss_masks, metrics
