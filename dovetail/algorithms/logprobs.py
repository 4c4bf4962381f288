"""Logprobs, entropy and their gradients through an LM head, in pieces of bounded memory.

N hidden states meet a head of V tokens; the [N, V] logits never exist whole. Because a loss value
depends on its own token only, the gradient of a piece is formed right after its logits, in the same
pass: no recomputation in the backward pass (three matrix products in all, as with materialised
logits).

Shapes: N scored tokens, n those of one piece, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PIECE_ELEMENTS = 4 * 1024 * 1024
"""Logits of one piece: 16 MB in float32. Measured on 2 cores: larger ones are not faster."""
MIN_PIECE = 64
"""Fewer rows than this make the matrix products slow for huge vocabularies."""


@dataclass(frozen=True, slots=True)
class Head:
    """How hidden states become logits: `cap * tanh((h @ weight.T + bias) * scale / cap)`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    """Cohere multiplies, Granite divides."""
    softcap: float | None = None
    """Gemma 2."""


TokenLoss = Callable[[slice, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(which of the N tokens, logprobs_n, entropy_n) -> scalar`: the piece's share of the loss."""


def _raw_logits(hidden_nH: torch.Tensor, head: Head) -> torch.Tensor:
    logits_nV = torch.nn.functional.linear(hidden_nH, head.weight_VH, head.bias_V).float()
    if head.scale != 1.0:
        logits_nV.mul_(head.scale)
    if head.softcap is not None:
        logits_nV.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits_nV


@dataclass(slots=True)
class _Piece:
    """Softmax statistics of n rows; `exp_nV` is overwritten by the gradient of the logits."""

    exp_nV: torch.Tensor
    sum_n: torch.Tensor
    logprobs_n: torch.Tensor
    entropy_n: torch.Tensor
    shifted_nV: torch.Tensor | None


def _softmax_piece(logits_nV: torch.Tensor, targets_n: torch.Tensor, keep: bool) -> _Piece:
    """From tempered logits (overwritten). `keep` retains the shifted logits for entropy
    gradients."""
    shifted_nV = logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
    target_n = shifted_nV.gather(1, targets_n[:, None]).squeeze(1)
    exp_nV = shifted_nV.exp()
    sum_n = exp_nV.sum(-1)
    log_sum_n = sum_n.log()
    mean_n = torch.linalg.vecdot(exp_nV, shifted_nV) / sum_n
    return _Piece(
        exp_nV, sum_n, target_n - log_sum_n, log_sum_n - mean_n, shifted_nV if keep else None
    )


def pieces(count: int, vocab: int) -> list[slice]:
    """Rows that meet the head together: `PIECE_ELEMENTS` logits of each."""
    rows = max(MIN_PIECE, PIECE_ELEMENTS // vocab)
    parts = max(1, -(-count // rows))
    size = -(-count // parts) if count else 0
    return [slice(i, min(i + size, count)) for i in range(0, count, max(size, 1))]


@torch.no_grad()
def head_logprobs(
    hidden_NH: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of the targets and entropy under `softmax(logits / temperature)`; [N] float32
    each."""
    logprobs_N = hidden_NH.new_empty(len(targets_N), dtype=torch.float32)
    entropy_N = torch.empty_like(logprobs_N)
    for part in pieces(len(targets_N), head.weight_VH.shape[0]):
        logits_nV = _raw_logits(hidden_NH[part], head)
        if temperature != 1.0:
            logits_nV.div_(temperature)
        piece = _softmax_piece(logits_nV, targets_N[part], keep=False)
        logprobs_N[part], entropy_N[part] = piece.logprobs_n, piece.entropy_n
    return logprobs_N, entropy_N


@torch.no_grad()
def head_gradients(
    hidden_NH: torch.Tensor,
    head: Head,
    targets_N: torch.Tensor,
    temperature: float,
    token_loss: TokenLoss,
    weight_grad_VH: torch.Tensor | None = None,
    bias_grad_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of `sum(token_loss)` by the hidden states, [N, H] in their type.

    `token_loss` is called once per piece, in order, with logprobs and entropy that require
    gradients. Gradients of weight and bias are added to the given float32 tensors.
    """
    grad_NH = torch.empty_like(hidden_NH)
    for part in pieces(len(targets_N), head.weight_VH.shape[0]):
        hidden_nH = hidden_NH[part]
        logits_nV = _raw_logits(hidden_nH, head)
        # tanh' = 1 - (capped logit / cap)^2, taken before the logits are overwritten.
        slope_nV = None if head.softcap is None else 1 - (logits_nV / head.softcap).square_()
        if temperature != 1.0:
            logits_nV.div_(temperature)
        piece = _softmax_piece(logits_nV, targets_N[part], keep=True)
        by_logprob_n, by_entropy_n = _loss_slopes(token_loss, part, piece)
        grad_nV = _logit_gradient(piece, targets_N[part], by_logprob_n, by_entropy_n)
        if slope_nV is not None:
            grad_nV.mul_(slope_nV)
        if head.scale != temperature:
            grad_nV.mul_(head.scale / temperature)
        _add_head_gradients(grad_nV, hidden_nH, weight_grad_VH, bias_grad_V)
        torch.mm(grad_nV.to(hidden_NH.dtype), head.weight_VH, out=grad_NH[part])
    return grad_NH


def _loss_slopes(
    token_loss: TokenLoss, part: slice, piece: _Piece
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.enable_grad():
        logprobs_n = piece.logprobs_n.detach().requires_grad_()
        entropy_n = piece.entropy_n.detach().requires_grad_()
        loss = token_loss(part, logprobs_n, entropy_n)
        by_logprob_n, by_entropy_n = torch.autograd.grad(
            loss, (logprobs_n, entropy_n), allow_unused=True
        )
    if by_logprob_n is None:
        by_logprob_n = torch.zeros_like(piece.logprobs_n)
    return by_logprob_n, by_entropy_n


def _logit_gradient(
    piece: _Piece,
    targets_n: torch.Tensor,
    by_logprob_n: torch.Tensor,
    by_entropy_n: torch.Tensor | None,
) -> torch.Tensor:
    """d loss / d tempered logits: `g (onehot - p) - h p (log p + entropy)`; overwrites the
    piece."""
    probs_nV = piece.exp_nV.div_(piece.sum_n[:, None])
    if by_entropy_n is None:
        grad_nV = probs_nV.mul_(-by_logprob_n[:, None])
    else:
        assert piece.shifted_nV is not None
        # log p + entropy = shifted - log sum + entropy
        offset_n = piece.entropy_n - piece.sum_n.log()
        factor_nV = piece.shifted_nV.add_(offset_n[:, None]).mul_(by_entropy_n[:, None])
        grad_nV = probs_nV.mul_(factor_nV.add_(by_logprob_n[:, None]).neg_())
    return grad_nV.scatter_add_(1, targets_n[:, None], by_logprob_n[:, None])


def _add_head_gradients(
    grad_nV: torch.Tensor,
    hidden_nH: torch.Tensor,
    weight_grad_VH: torch.Tensor | None,
    bias_grad_V: torch.Tensor | None,
) -> None:
    if weight_grad_VH is not None:
        if hidden_nH.dtype == torch.float32:
            weight_grad_VH.addmm_(grad_nV.t(), hidden_nH)
        else:
            weight_grad_VH.add_(grad_nV.to(hidden_nH.dtype).t() @ hidden_nH)
    if bias_grad_V is not None:
        bias_grad_V.add_(grad_nV.sum(0))
