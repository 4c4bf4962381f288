"""The modules of a layer that megatron-core has only through Transformer Engine: a norm that knows
sequence parallelism, and attention over packed sequences that context parallelism may split.

Any device. Shapes: s tokens of this rank, h heads, g groups of keys, d channels of a head.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from dovetail.trainers import zigzag


class Norm(torch.nn.Module):
    """RMS norm in float32, its weight marked for the sum over sequence-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class CoreAttention(MegatronModule):
    """Causal attention of each sequence of a packed line to itself.

    Under context parallelism each rank has a part of every sequence (`dovetail.trainers.zigzag`);
    keys and values of all ranks are gathered (Llama 3's way, arXiv:2407.21783, 3.3.2).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **more: Any,
    ):
        super().__init__(config=config)
        group = getattr(more.get("pg_collection"), "cp", None)
        self.group = parallel_state.get_context_parallel_group() if group is None else group
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: Any = None,
        **more: Any,
    ) -> torch.Tensor:
        """query [s, h, d] with key and value [s, g, d], or with a batch of 1 behind s; [s, h * d],
        with it."""
        batched = query.ndim == 4
        if batched:
            query, key, value = (one.squeeze(1) for one in (query, key, value))
        size = self.group.size()
        if packed_seq_params is None:
            lengths = [len(query)]
        else:
            ends = packed_seq_params.cu_seqlens_q.tolist()
            lengths = [(b - a) // size for a, b in itertools.pairwise(ends)]
        parts = zip(*(one.split(lengths) for one in (query, key, value)), strict=True)
        outputs = torch.cat([self._one(*part) for part in parts])
        return outputs.unsqueeze(1) if batched else outputs

    def _one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        size = self.group.size()
        mask = None
        if size > 1:
            k, v = _Gathered.apply(k, self.group), _Gathered.apply(v, self.group)
            own = zigzag.dealt(len(k), self.group.rank(), size).to(q.device)
            mask = zigzag.order(len(k), size).to(q.device)[None, :] <= own[:, None]
        query, key, value = (one.transpose(0, 1)[None] for one in (q, k, v))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return output[0].transpose(0, 1).flatten(1)

    def sharded_state_dict(self, *_: Any, **more: Any) -> dict[str, Any]:
        """It has no weights."""
        return {}


class _Gathered(torch.autograd.Function):
    """[s, ...] of each rank -> [size * s, ...], in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
        ]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = grads[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()], None
