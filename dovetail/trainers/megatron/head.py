"""Logprobs and entropy through a head whose vocabulary is split over ranks, in pieces of bounded
memory.

The [N, V] logits never exist whole: forward keeps three numbers a token, backward makes each
piece's logits again. A rank's part of the vocabulary gives partial maxima and sums; only those
travel.

Shapes: N scored tokens, n those of one piece, H hidden size, v this rank's part of the vocabulary
without its padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dovetail.algorithms.logprobs import pieces


def vocab_parallel_logprobs(
    hidden_NH: torch.Tensor,
    weight_vH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    first: int,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of the targets and entropy under `softmax(hidden @ weight.T / temperature)`, [N]
    float32 each, equal on every rank; they carry gradients.

    `first`: the token id of the weight's first row. The gradient by the hidden states is this
    rank's part of a sum over `group`.
    """
    return _Scored.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden_NH, weight_vH, targets_N, temperature, first, group
    )


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_vH: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        first: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_N = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
        entropy_N, log_sum_N = torch.empty_like(logprobs_N), torch.empty_like(logprobs_N)
        own_N = (targets_N - first).clamp(0, len(weight_vH) - 1)
        here_N = (targets_N >= first) & (targets_N < first + len(weight_vH))
        for part in pieces(len(targets_N), len(weight_vH)):
            logits_nv = _logits(hidden_NH[part], weight_vH, temperature)
            top_n = logits_nv.amax(-1)
            dist.all_reduce(top_n, op=dist.ReduceOp.MAX, group=group)
            shifted_nv = logits_nv.sub_(top_n[:, None])
            target_n = shifted_nv.gather(1, own_N[part][:, None]).squeeze(1) * here_N[part]
            exp_nv = shifted_nv.exp()
            sums = torch.stack([exp_nv.sum(-1), torch.linalg.vecdot(exp_nv, shifted_nv), target_n])
            dist.all_reduce(sums, group=group)
            log_n = sums[0].log()
            logprobs_N[part] = sums[2] - log_n
            entropy_N[part] = log_n - sums[1] / sums[0]
            log_sum_N[part] = log_n + top_n
        ctx.save_for_backward(hidden_NH, weight_vH, own_N, here_N, log_sum_N, entropy_N)
        ctx.temperature = temperature
        return logprobs_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None, None]:
        by_logprob_N, by_entropy_N = grads
        hidden_NH, weight_vH, own_N, here_N, log_sum_N, entropy_N = ctx.saved_tensors
        grad_NH = torch.empty_like(hidden_NH)
        grad_vH = (
            torch.zeros_like(weight_vH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for part in pieces(len(own_N), len(weight_vH)):
            hidden_nH = hidden_NH[part]
            log_nv = _logits(hidden_nH, weight_vH, ctx.temperature)
            log_nv.sub_(log_sum_N[part][:, None])
            probs_nv = log_nv.exp()
            # d entropy / d logit = -p (log p + entropy); d logprob / d logit = onehot - p.
            slope_nv = log_nv.add_(entropy_N[part][:, None]).mul_(by_entropy_N[part][:, None])
            slope_nv.add_(by_logprob_N[part][:, None])
            grad_nv = probs_nv.mul_(slope_nv).neg_()
            grad_nv.scatter_add_(
                1, own_N[part][:, None], (by_logprob_N[part] * here_N[part])[:, None]
            )
            grad_nv.div_(ctx.temperature)
            cast_nv = grad_nv.to(hidden_NH.dtype)
            torch.mm(cast_nv, weight_vH, out=grad_NH[part])
            if grad_vH is not None:
                grad_vH.add_(cast_nv.t() @ hidden_nH)
        return (
            grad_NH,
            None if grad_vH is None else grad_vH.to(weight_vH.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(hidden_nH: torch.Tensor, weight_vH: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_nv = torch.nn.functional.linear(hidden_nH, weight_vH).float()
    return logits_nv if temperature == 1.0 else logits_nv.div_(temperature)
