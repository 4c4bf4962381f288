"""Corrections of off-policy samples under the family's call form: everything by keyword."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dovetail.algorithms import corrections
from dovetail.algorithms.corrections import Corrected
from dovetail.types.calls import CorrectionCall

__all__ = ["icepop_function", "vanilla_tis_function"]

Tensors = Sequence[torch.Tensor]


def vanilla_tis_function(
    args: Any,
    *,
    pg_loss: torch.Tensor,
    train_log_probs: Tensors,
    rollout_log_probs: Tensors,
    loss_masks: Tensors,
    **others: Any,
) -> Corrected:
    """See `dovetail.algorithms.corrections.vanilla_tis_function`."""
    logprobs = (train_log_probs, rollout_log_probs)
    return _call(corrections.vanilla_tis_function, args, pg_loss, logprobs, loss_masks, others)


def icepop_function(
    args: Any,
    *,
    pg_loss: torch.Tensor,
    train_log_probs: Tensors,
    rollout_log_probs: Tensors,
    loss_masks: Tensors,
    **others: Any,
) -> Corrected:
    """See `dovetail.algorithms.corrections.icepop_function`."""
    logprobs = (train_log_probs, rollout_log_probs)
    return _call(corrections.icepop_function, args, pg_loss, logprobs, loss_masks, others)


def _call(
    function: Callable[[CorrectionCall], Corrected],
    args: Any,
    pg_loss: torch.Tensor,
    logprobs: tuple[Tensors, Tensors],
    loss_masks: Tensors,
    others: dict[str, Any],
) -> Corrected:
    lengths = [len(mask) for mask in loss_masks]
    call = CorrectionCall(
        pg_loss=pg_loss,
        train_log_probs=list(logprobs[0]),
        rollout_log_probs=list(logprobs[1]),
        loss_masks=list(loss_masks),
        total_lengths=list(others.get("total_lengths") or lengths),
        response_lengths=list(others.get("response_lengths") or lengths),
        args=args,
    )
    return function(call)
