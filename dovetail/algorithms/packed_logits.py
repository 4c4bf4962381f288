"""Losses over whole sequences: a micro-batch's sequences end to end, as the slime family's loss
functions see them.

Their names and call forms are kept, so that losses written for them run as they are.

Shapes: T tokens of all sequences, V vocabulary, R response tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def get_responses(
    logits: torch.Tensor,
    *,
    args: Any,
    unconcat_tokens: Sequence[torch.Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    apply_temperature: bool = True,
    **_: Any,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per sequence the logits that predict its response [R, V], and the response's tokens [R].

    logits: [1, T, V] or [T, V]; with `apply_temperature` they are divided by
    `args.rollout_temperature`.
    """
    logits_TV = logits.squeeze(0) if logits.ndim == 3 else logits
    if apply_temperature and args.rollout_temperature != 1.0:
        logits_TV = logits_TV / args.rollout_temperature
    end = 0
    for tokens, total, response in zip(
        unconcat_tokens, total_lengths, response_lengths, strict=True
    ):
        end += total
        yield logits_TV[end - response - 1 : end - 1], tokens[total - response : total]


def get_log_probs_and_entropy(
    logits: torch.Tensor,
    *,
    args: Any,
    unconcat_tokens: Sequence[torch.Tensor],
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    with_entropy: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """Logprobs of the response tokens under `softmax(logits / args.rollout_temperature)`, and the
    entropy of that distribution.

    Returns:
        An empty tensor, and `{"log_probs": [[R], ...]}`, with `with_entropy` also "entropy"; all
        carry gradients.
    """
    found: dict[str, list[torch.Tensor]] = {"log_probs": []}
    if with_entropy:
        found["entropy"] = []
    for logits_RV, tokens_R in get_responses(
        logits,
        args=args,
        unconcat_tokens=unconcat_tokens,
        total_lengths=total_lengths,
        response_lengths=response_lengths,
    ):
        all_RV = torch.log_softmax(logits_RV.float(), -1)
        targets_R = tokens_R.to(all_RV.device, torch.long)
        found["log_probs"].append(all_RV.gather(1, targets_R[:, None]).squeeze(1))
        if with_entropy:
            found["entropy"].append(-(all_RV.exp() * all_RV).sum(-1))
    return logits.new_empty((0,)), found


def get_sum_of_sample_mean(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[torch.Tensor],
    rollout_mask_sums: Sequence[Any] | bool | None = None,
    calculate_per_token_loss: bool = False,
    qkv_format: str = "thd",
    max_seq_lens: Sequence[int] | None = None,
) -> Reduce:
    """A function from values at all response tokens (flat, sequence after sequence) to a scalar:
    the sum over sequences of their masked sum over `rollout_mask_sums`.

    The sequences of one rollout share its number of trained tokens as divisor, so the sum over them
    is the rollout's token mean, and any split into micro-batches adds up to the same. Without
    `rollout_mask_sums` each sequence is divided by its own trained tokens, and a bool in its place
    is the fourth argument of the older call form, `calculate_per_token_loss`. That one leaves the
    division out.
    """
    sums: Sequence[Any] = [mask.sum() for mask in loss_masks]
    if isinstance(rollout_mask_sums, bool):
        calculate_per_token_loss = rollout_mask_sums
    elif rollout_mask_sums is not None:
        sums = rollout_mask_sums
    divisors = [1.0 if calculate_per_token_loss else max(float(total), 1.0) for total in sums]

    def reduce(values: torch.Tensor) -> torch.Tensor:
        parts = values.split(list(response_lengths), dim=0)
        terms = [
            (part * mask.to(part.device)).sum() / divisor
            for part, mask, divisor in zip(parts, loss_masks, divisors, strict=True)
        ]
        return torch.stack(terms).sum() if terms else values.sum()

    return reduce
