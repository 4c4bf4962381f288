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

    @property
    def device(self) -> torch.device:
        """Where tensors have to be that ranks exchange."""
        return torch.device("cpu") if self.group is None else _device_of(self.group)

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

    def known(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over all ranks, in place: what one rank knows where others have less than
        any value."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def told(self, facts: Any) -> list[Any]:
        """What every rank says, in their order. Anything that JSON can write."""
        return [facts] if self.group is None else told_in(self.group, facts)


ALONE = DataParallel()


def told_in(group: dist.ProcessGroup, facts: Any) -> list[Any]:
    """What every rank of a group says, in their order. Anything that JSON can write."""
    device = _device_of(group)
    own = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8).to(device)
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device)
    padded[: len(own)] = own
    every = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(every, padded, group=group)
    pairs = zip(every, sizes, strict=True)
    return [json.loads(one[: int(size)].cpu().numpy().tobytes()) for one, size in pairs]


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
