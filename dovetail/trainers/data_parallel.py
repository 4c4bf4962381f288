"""Ranks that hold the same weights, know the same rows, and split the micro-batches of every pass.

Everything that looks at a rollout as a whole (advantages, hooks, weights in the loss) is computed
on every rank from all rows, so it is what one rank alone computes. Only passes through a model are
shared out; their results are put together again: scores row by row, gradients and metrics as sums.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dovetail.batch.plan import PlannedBatch


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank does of a pass."""

    mine: list[PlannedBatch]
    idle: int
    """Rounds in which other ranks have a micro-batch and this one has none: it takes part in their
    collectives all the same."""


class DataParallel:
    """One rank's place among `size` that split the work.

    Args:
        rank: which share this one takes.
        size: into how many shares the work is split.
        group: every rank that has a piece of the results, each piece once; None: this rank has all
            of them.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.size, self.group = rank, size, group

    def share(self, planned: Sequence[PlannedBatch]) -> Share:
        """This rank's micro-batches: the longest first, each to the rank with the fewest tokens of
        those with the fewest micro-batches."""
        shares: list[list[PlannedBatch]] = [[] for _ in range(self.size)]
        tokens = [0] * self.size
        for batch in sorted(planned, key=lambda batch: -batch.num_tokens):
            to = min(range(self.size), key=lambda rank: (len(shares[rank]), tokens[rank], rank))
            shares[to].append(batch)
            tokens[to] += batch.num_tokens
        mine = shares[self.rank]
        return Share(mine, max(map(len, shares)) - len(mine))

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def told(self, facts: Any) -> list[Any]:
        """What every rank says, in their order. Anything that JSON can write."""
        if self.group is None:
            return [facts]
        by_nccl = dist.get_backend(self.group) == "nccl"
        device = torch.device("cuda" if by_nccl else "cpu")
        own = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8).to(device)
        world = dist.get_world_size(self.group)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=device), group=self.group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device)
        padded[: len(own)] = own
        every = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(every, padded, group=self.group)
        pairs = zip(every, sizes, strict=True)
        return [json.loads(one[: int(size)].cpu().numpy().tobytes()) for one, size in pairs]


ALONE = DataParallel()
