"""Each sequence split over the ranks of a context parallel group.

Every rank runs the model on its own positions of padded lines. Attention, which alone looks at
other positions, gathers all keys and values; its backward pass adds up their gradients where they
came from. Positions are dealt zig-zag (`dovetail.trainers.zigzag`).

It is an attention implementation for transformers models, like tree attention, and runs on any
device. Shapes: B lines of T tokens (padded to a multiple of 2 x size), t of them here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.trainers import zigzag
from dovetail.trainers.torch.tree_attention import check_asked

NAME = "dovetail_context_parallel"


class ContextParallel:
    """Which positions this rank has, and how those of all ranks come together."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size

    def padded(self, length: int) -> int:
        """The least length of lines that can be dealt."""
        return -(-length // (2 * self.size)) * 2 * self.size

    def positions(self, length: int) -> torch.Tensor:
        """This rank's, of lines of `length` tokens, [t]."""
        return zigzag.dealt(length, self.rank, self.size)

    def together(self, values_BtH: torch.Tensor) -> torch.Tensor:
        """All ranks' values in the order of positions, [B, T, H].

        Every rank goes on with the same values and has the same gradient of them, so that each
        takes its own part of it: nothing is added up.
        """
        gathered: torch.Tensor = _Together.apply(values_BtH, self)  # type: ignore[no-untyped-call]
        return gathered

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """query [B, A, t, D], key and value [B, K, t, D]; the output is [B, t, A, D]."""
        length = query.shape[2] * self.size
        key, value = (_Gathered.apply(x, self) for x in (key, value))  # type: ignore[no-untyped-call]
        own = self.positions(length).to(query.device)
        all_T = zigzag.order(length, self.size).to(query.device)
        seen = all_T[None, :] <= own[:, None]
        if window is not None:
            seen &= all_T[None, :] > own[:, None] - window
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    context_parallel: ContextParallel | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    check_asked(context_parallel, attention_mask, kwargs)
    assert context_parallel is not None
    window = kwargs.get("sliding_window")
    out = context_parallel.attention(query, key, value, scaling, window)
    return out, None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


class _Gathered(torch.autograd.Function):
    """[B, K, t, D] of every rank, one after another, [B, K, T, D]; backward adds up."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, cp: ContextParallel) -> torch.Tensor:  # type: ignore[override]
        ctx.cp = cp
        return torch.cat(_all_gather(own, cp), 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        parts = [part.contiguous() for part in grad.chunk(ctx.cp.size, 2)]
        stacked = torch.stack(parts)
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, stacked.flatten(0, 1), group=ctx.cp.group)
        return own, None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, cp: ContextParallel) -> torch.Tensor:  # type: ignore[override]
        length = own.shape[1] * cp.size
        ctx.positions = cp.positions(length).to(own.device)
        gathered = torch.cat(_all_gather(own, cp), 1)
        return gathered[:, zigzag.order(length, cp.size).argsort().to(own.device)]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad[:, ctx.positions], None


def _all_gather(own: torch.Tensor, cp: ContextParallel) -> list[torch.Tensor]:
    own = own.contiguous()
    every = [torch.empty_like(own) for _ in range(cp.size)]
    dist.all_gather(every, own, group=cp.group)
    return every
