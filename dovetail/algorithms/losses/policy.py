"""The clipped policy-gradient loss."""

from __future__ import annotations

import torch

from dovetail.algorithms.inputs import TokenInputs
from dovetail.algorithms.kl import kl_estimate
from dovetail.config.sections import AlgorithmConfig


def clipped_loss(
    ratio_N: torch.Tensor,
    advantages_N: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`-min(ratio * A, clip(ratio, 1 - eps_clip, 1 + eps_clip_high) * A)`, and where the clip
    binds.

    With `eps_clip_c = c` the loss of a token with A < 0 is at most `-c * A` (dual clip).

    Sources: PPO, arXiv 1707.06347, eq. 7; clip-higher: DAPO, arXiv 2503.14476, eq. 10; dual clip:
    arXiv 1912.09729, eq. 5.

    Returns:
        The loss [N] and 1.0 where clipping took the gradient away [N].
    """
    free_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - eps_clip, 1 + eps_clip_high)
    loss_N = torch.maximum(free_N, clipped_N)
    bound_N = clipped_N > free_N
    if eps_clip_c is not None:
        ceiling_N = -eps_clip_c * advantages_N
        over_N = (advantages_N < 0) & (loss_N > ceiling_N)
        loss_N = torch.where(over_N, ceiling_N, loss_N)
        bound_N = bound_N | over_N
    return loss_N, bound_N.to(loss_N.dtype)


def policy_terms(
    inputs: TokenInputs, config: AlgorithmConfig
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """The policy loss alone, what is added to it (None: nothing), and metrics; each [N]."""
    ratio_N = torch.exp(inputs.logprobs_N - inputs.old_logprobs_N)
    high = config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
    pg_N, clip_N = clipped_loss(
        ratio_N, inputs.advantages_N, config.eps_clip, high, config.eps_clip_c
    )
    metrics = {
        "pg_loss": pg_N,
        "clip_frac": clip_N,
        "ratio_mean": ratio_N,
        "entropy": inputs.entropy_N,
    }
    added_N = None
    if inputs.ref_logprobs_N is not None:
        kl_N = kl_estimate(inputs.logprobs_N, inputs.ref_logprobs_N, config.kl_loss_type)
        metrics["kl"] = kl_N
        if config.use_kl_loss and config.kl_loss_coef:
            added_N = config.kl_loss_coef * kl_N
    if config.entropy_coef:
        bonus_N = -config.entropy_coef * inputs.entropy_N
        added_N = bonus_N if added_N is None else added_N + bonus_N
    return pg_N, added_N, metrics


def policy_loss(
    inputs: TokenInputs, config: AlgorithmConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped ratio, plus `kl_loss_coef` x KL to the reference, minus `entropy_coef` x entropy;
    [N]."""
    pg_N, added_N, metrics = policy_terms(inputs, config)
    return pg_N if added_N is None else pg_N + added_N, metrics
