"""How the positions of a sequence are dealt to the ranks of a context parallel group.

Of 2 x size chunks of equal length rank r has number r from the front and from the back, so that
causal attention costs each rank about the same. T tokens of the sequence, t of them a rank's.
"""

from __future__ import annotations

import torch


def dealt(length: int, rank: int, size: int) -> torch.Tensor:
    """The positions that a rank has of `length`, a multiple of 2 x size, [t]."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def order(length: int, size: int) -> torch.Tensor:
    """Which position stands where when all ranks' own are gathered one after another, [T]."""
    return torch.cat([dealt(length, rank, size) for rank in range(size)])
