"""A micro-batch as Megatron's modules take it: one packed line, its sequences padded so that they
can be split, and this rank's part of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from dovetail.batch.pack import MicroBatch
from dovetail.trainers.megatron.parallel import Ranks
from dovetail.trainers.zigzag import dealt

PADDING = -1


@dataclass(frozen=True, slots=True)
class Line:
    """One micro-batch on one rank. S tokens are this context-parallel rank's."""

    input_ids_1S: torch.Tensor
    position_ids_1S: torch.Tensor
    packing: Any
    """Megatron's PackedSeqParams, of the whole line."""
    flat_S: torch.Tensor
    """Which flat position of the micro-batch each of this rank's tokens is; -1: padding."""
    batch: MicroBatch | None
    """None: this rank has no micro-batch in this round, and takes part all the same."""
    scored_n: torch.Tensor
    """Which of the micro-batch's N scored positions are on this rank."""
    at_n: torch.Tensor
    """Where among this rank's tokens."""

    @property
    def count(self) -> int:
        """N."""
        return 0 if self.batch is None else len(self.batch.targets_N)


def line_of(batch: MicroBatch, ranks: Ranks) -> Line:
    """Lay out a micro-batch that was planned without shared prompts."""
    assert batch.position_ids_BT is not None
    lengths = [segment.length for segment in batch.segments]
    return _line(batch.input_ids_BT[0], lengths, batch, ranks)


def idle_line(ranks: Ranks) -> Line:
    """A few tokens that count for nothing."""
    return _line(torch.zeros(1, dtype=torch.long), [1], None, ranks)


def _line(
    tokens_T: torch.Tensor, lengths: list[int], batch: MicroBatch | None, ranks: Ranks
) -> Line:
    piece = 2 * ranks.cp_size if ranks.cp_size > 1 else 1
    flat, positions, ends, start = [], [], [0], 0
    for length in lengths:
        padded = -(-length // piece) * piece
        flat.append(_filled(torch.arange(start, start + length), padded))
        positions.append(torch.arange(padded))
        ends.append(ends[-1] + padded)
        start += length
    # The tensor-parallel ranks split what is on each context-parallel one.
    missing = -ends[-1] % (piece * ranks.tp_size)
    if missing:
        flat.append(torch.full((missing,), PADDING))
        positions.append(torch.arange(missing))
        ends.append(ends[-1] + missing)
    own = _of_rank(ends, ranks)
    flat_S, positions_S = torch.cat(flat)[own], torch.cat(positions)[own]
    ids_S = torch.where(flat_S == PADDING, 0, tokens_T[flat_S.clamp_min(0)])
    scored_n, at_n = _scored(flat_S, batch)
    cu = torch.tensor(ends, dtype=torch.int32, device=ranks.device)
    longest = max(b - a for a, b in itertools.pairwise(ends))
    return Line(
        input_ids_1S=ids_S[None].to(ranks.device),
        position_ids_1S=positions_S[None].to(ranks.device),
        packing=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu,
            cu_seqlens_kv=cu,
            cu_seqlens_q_padded=cu,
            cu_seqlens_kv_padded=cu,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        flat_S=flat_S,
        batch=batch,
        scored_n=scored_n.to(ranks.device),
        at_n=at_n.to(ranks.device),
    )


def _filled(values: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=PADDING)


def _of_rank(ends: list[int], ranks: Ranks) -> torch.Tensor:
    if ranks.cp_size == 1:
        return torch.arange(ends[-1])
    pairs = itertools.pairwise(ends)
    return torch.cat([a + dealt(b - a, ranks.cp, ranks.cp_size) for a, b in pairs])


def _scored(flat_S: torch.Tensor, batch: MicroBatch | None) -> tuple[torch.Tensor, torch.Tensor]:
    if batch is None:
        none = torch.empty(0, dtype=torch.long)
        return none, none
    where = torch.full((batch.input_ids_BT.numel(),), PADDING)
    known = flat_S != PADDING
    where[flat_S[known]] = torch.arange(len(flat_S))[known]
    at_N = where[batch.hidden_index_N]
    scored_n = (at_N != PADDING).nonzero().squeeze(1)
    return scored_n, at_N[scored_n]
