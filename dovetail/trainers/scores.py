"""One number per response token of every row, from a model that sees micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from dovetail.batch.pack import MicroBatch, pack
from dovetail.batch.plan import PlannedBatch, Scope
from dovetail.batch.rows import TrainRow
from dovetail.trainers.data_parallel import ALONE, DataParallel

Scores = dict[int, torch.Tensor]
"""Row position -> [response_length] float32, 0.0 where a token was not scored."""
Plan = Callable[[Sequence[TrainRow], Sequence[int], Scope], list[PlannedBatch]]
Evaluate = Callable[[Iterable[MicroBatch], int], Iterable[torch.Tensor]]
"""`(micro-batches, idle rounds) -> [N] float32 each`, at their scored tokens."""


def score_rows(
    rows: Sequence[TrainRow],
    chosen: Sequence[int],
    scope: Scope,
    plan: Plan,
    evaluate: Evaluate,
    pad_token_id: int,
    parallel: DataParallel = ALONE,
) -> Scores:
    """Evaluate the chosen rows in micro-batches, each on one rank; all scores come back on every
    rank's CPU."""
    share = parallel.share(plan(rows, list(chosen), scope))
    ends = torch.tensor([0] + [rows[i].response_length for i in chosen]).cumsum(0).tolist()
    flat = torch.zeros(ends[-1])
    scores = {i: flat[a:b] for i, a, b in zip(chosen, ends, ends[1:], strict=False)}
    packed: list[tuple[tuple[int, ...], tuple[torch.Tensor, ...]]] = []

    def batches() -> Iterator[MicroBatch]:
        for planned in share.mine:
            batch = pack(rows, planned, pad_token_id, scope)
            packed.append((batch.rows, batch.scored))
            yield batch

    for number, values_N in enumerate(evaluate(batches(), share.idle)):
        positions, offsets = packed[number]
        parts = values_N.cpu().split([len(scored) for scored in offsets])
        for i, where, part in zip(positions, offsets, parts, strict=True):
            scores[i][where] = part
    parallel.summed(flat)
    return scores
