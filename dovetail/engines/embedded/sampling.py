"""Choosing the next token of many rows at once.

The draw for response position i of a request is a hash of (seed, i), turned into a token by the
inverse of the cumulative distribution: it does not depend on the other rows, nor on any generator's
state.

Shapes: N rows, V vocabulary, F rows that cut their distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.types.calls import SamplingParams

_CHUNK = 64
_NUCLEUS_GUESS = 512
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    # Generators).
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, response position).

    Args:
        seeds: [N] uint64.
        positions: [N] uint64, position in the response counted from 0.

    Returns:
        [N] float64 with 53 random bits.
    """
    return (_mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True, slots=True)
class _Cut:
    """The rows that use top-k, top-p or min-p."""

    rows: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    most_k: int
    """Largest top-k, or 0 if a row has none."""
    nucleus: bool


@dataclass(slots=True)
class RowSampling:
    """Sampling settings of the rows of a batch, as vectors."""

    seeds: np.ndarray
    positions: np.ndarray
    temperatures: Tensor | None
    """[N, 1], or None if all are 1."""
    greedy: Tensor | None
    """[N] bool, or None if no row is greedy."""
    cut: _Cut | None
    banned: tuple[Tensor, Tensor] | None
    """Row and token indices that may not be sampled now (stop tokens before `min_new_tokens`)."""


def build_row_sampling(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    banned: Sequence[Sequence[int]],
    device: torch.device,
) -> RowSampling:
    """Vectors from per-row settings; `banned[i]` are token ids that row i may not sample now."""
    temperatures = [p.temperature if p.temperature > 0 else 1.0 for p in params]
    greedy = [p.temperature <= 0 for p in params]
    pairs = [(row, token) for row, tokens in enumerate(banned) for token in tokens]
    return RowSampling(
        seeds=np.array(seeds, dtype=np.uint64),
        positions=np.array(positions, dtype=np.uint64),
        temperatures=None
        if all(t == 1.0 for t in temperatures)
        else torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None],
        greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
        cut=_build_cut(params, device),
        banned=None
        if not pairs
        else (
            torch.tensor([r for r, _ in pairs], device=device),
            torch.tensor([t for _, t in pairs], device=device),
        ),
    )


def _build_cut(params: Sequence[SamplingParams], device: torch.device) -> _Cut | None:
    rows = [
        i
        for i, p in enumerate(params)
        if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
    ]
    if not rows:
        return None
    top_k = [params[i].top_k for i in rows]
    return _Cut(
        rows=torch.tensor(rows, device=device),
        top_k=torch.tensor([k if k > 0 else 2**31 for k in top_k], device=device)[:, None],
        top_p=torch.tensor([params[i].top_p for i in rows], device=device)[:, None],
        min_p=torch.tensor([params[i].min_p for i in rows], device=device)[:, None],
        most_k=max(top_k) if min(top_k) > 0 else 0,
        nucleus=any(params[i].top_p < 1.0 for i in rows),
    )


def sample(logits_NV: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_NV: [N, V] float32; may be overwritten.

    Returns:
        tokens [N] int64, and their logprobs [N] float32 under the temperature, before any cut
        (the convention of `SamplingParams`).
    """
    if rows.temperatures is not None:
        logits_NV = logits_NV.div_(rows.temperatures)
    top_N1 = logits_NV.amax(-1, keepdim=True)
    weights_NV = (logits_NV - top_N1).exp_()
    sums = _chunk_sums(weights_NV)
    total_N1 = sums[:, -1:]
    candidates_NV = logits_NV
    if rows.banned is not None:
        candidates_NV = logits_NV.clone()
        candidates_NV[rows.banned] = float("-inf")
        weights_NV[rows.banned] = 0.0
        sums = _chunk_sums(weights_NV)
    uniform_N1 = torch.from_numpy(uniforms(rows.seeds, rows.positions)).to(logits_NV.device)[
        :, None
    ]
    tokens_N = _inverse_cdf(weights_NV, sums, uniform_N1)
    if rows.cut is not None:
        tokens_N[rows.cut.rows] = _sample_cut(
            weights_NV[rows.cut.rows], rows.cut, uniform_N1[rows.cut.rows]
        )
    if rows.greedy is not None:
        tokens_N = torch.where(rows.greedy, candidates_NV.argmax(-1), tokens_N)
    picked_N1 = logits_NV.gather(1, tokens_N[:, None]) - top_N1
    return tokens_N, (picked_N1 - total_N1.log()).squeeze(1).float()


def _padded(weights_NV: Tensor) -> Tensor:
    over = -weights_NV.shape[1] % _CHUNK
    return torch.nn.functional.pad(weights_NV, (0, over)) if over else weights_NV


def _chunk_sums(weights_NV: Tensor) -> Tensor:
    """Cumulative weight at the end of each chunk of the vocabulary, [N, chunks] float64."""
    n = weights_NV.shape[0]
    return _padded(weights_NV).view(n, -1, _CHUNK).sum(-1).double().cumsum(-1)


def _inverse_cdf(weights_NV: Tensor, sums: Tensor, uniform_N1: Tensor) -> Tensor:
    n = weights_NV.shape[0]
    target = uniform_N1 * sums[:, -1:]
    chunk = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = sums.gather(1, (chunk - 1).clamp_(min=0)).masked_fill_(chunk == 0, 0.0)
    chunks = _padded(weights_NV).view(n, -1, _CHUNK)
    inside = chunks[torch.arange(n, device=chunks.device), chunk[:, 0]]
    within = torch.searchsorted(inside.double().cumsum(-1), target - before, right=True)
    within = within.clamp_(max=_CHUNK - 1)
    # Rounding at a chunk's end can point one past its last candidate: take its most probable one.
    missed = inside.gather(1, within) == 0
    within = torch.where(missed, inside.argmax(-1, keepdim=True), within)
    return (chunk * _CHUNK + within).squeeze(1)


def _sample_cut(weights_FV: Tensor, cut: _Cut, uniform_F1: Tensor) -> Tensor:
    """top-k, then top-p of what is left, then min-p; ties go to the lower rank of the sort."""
    total_F1 = weights_FV.sum(-1, keepdim=True)
    ranked, ids = _ranked(weights_FV, total_F1, cut)
    rank = torch.arange(ranked.shape[1], device=ranked.device)[None]
    ranked = ranked.masked_fill(rank >= cut.top_k, 0.0)
    total_F1 = torch.where(cut.top_k > weights_FV.shape[1], total_F1, ranked.sum(-1, keepdim=True))
    before = ranked.double().cumsum(-1) - ranked
    # The most probable token always stays, whatever rounding says about its share.
    drop = (before >= cut.top_p.double() * total_F1) & (cut.top_p < 1.0)
    drop |= ranked < cut.min_p * ranked[:, :1]
    drop[:, 0] = False
    kept = ranked.masked_fill(drop, 0.0).double().cumsum(-1)
    choice = torch.searchsorted(kept, uniform_F1 * kept[:, -1:], right=True)
    choice = choice.clamp_(max=ranked.shape[1] - 1)
    choice = torch.where(ranked.masked_fill(drop, 0.0).gather(1, choice) == 0, 0, choice)
    return ids.gather(1, choice).squeeze(1)


def _ranked(weights_FV: Tensor, total_F1: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Candidates from most to least probable; only as many as the cuts can keep."""
    vocab = weights_FV.shape[1]
    if 0 < cut.most_k < vocab:
        return weights_FV.topk(cut.most_k, dim=-1)
    if cut.nucleus and vocab > _NUCLEUS_GUESS:
        ranked, ids = weights_FV.topk(_NUCLEUS_GUESS, dim=-1)
        nucleus_held = ranked.sum(-1, keepdim=True) > cut.top_p * total_F1
        nucleus_held &= (cut.top_p < 1.0) & (cut.top_k > vocab)
        if bool((nucleus_held | (cut.top_k <= _NUCLEUS_GUESS)).all()):
            return ranked, ids
    return weights_FV.sort(dim=-1, descending=True, stable=True)
