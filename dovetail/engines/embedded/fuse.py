"""One storage for the projections that are read together, without a second copy of any weight.

The query, key and value matrices of a layer become row ranges of one matrix, gate and up of
another; the model's parameters are re-pointed to those ranges. The model computes what it computed
before, optimizers that write in place are seen at once, and a decode step reads one matrix instead
of three.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


def why_not_fusable(model: PreTrainedModel) -> str | None:
    """The first reason against the fused path, or None."""
    config: Any = model.config
    if type(model).__name__ not in _FAMILIES:
        return f"{type(model).__name__} is not one of {', '.join(_FAMILIES)}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    parameters = list(model.parameters())
    reasons = {
        f"activation {config.hidden_act!r} is not 'silu'": config.hidden_act != "silu",
        f"rope type {rope!r} changes with length": rope not in _FIXED_ROPE,
        "some layers use a sliding window": _slides(config),
        "parameters differ in dtype or device": len({(p.dtype, p.device) for p in parameters}) != 1,
        f"dtype {parameters[0].dtype} is neither float32 nor bfloat16": parameters[0].dtype
        not in (torch.float32, torch.bfloat16),
        "some projections are not plain linear layers": not all(
            type(m) is nn.Linear for layer in model.model.layers for m in _projections(layer)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _projections(layer: Any) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )


class Joined:
    """Tensors of equal row length laid out as one; `whole` reads them together."""

    def __init__(self, parts: Seq[nn.Parameter]) -> None:
        self._parts = list(parts)
        self.whole = self._join()

    def refresh(self) -> None:
        """Join again if someone re-pointed a parameter since."""
        offset = self.whole.storage_offset()
        for part in self._parts:
            same = part.data.untyped_storage().data_ptr() == self.whole.untyped_storage().data_ptr()
            if not same or part.data.storage_offset() != offset:
                self.whole = self._join()
                return
            offset += part.numel()

    def _join(self) -> Tensor:
        whole = torch.cat([p.data for p in self._parts])
        start = 0
        for part in self._parts:
            part.data = whole[start : start + part.shape[0]]
            start += part.shape[0]
        return whole


@dataclass(slots=True)
class FusedLayer:
    """The tensors of one decoder layer, as the fused runner reads them."""

    module: Any
    qkv: Joined
    qkv_bias: Joined | None
    gate_up: Joined
    gate_up_bias: Joined | None

    def refresh(self) -> None:
        for joined in (self.qkv, self.qkv_bias, self.gate_up, self.gate_up_bias):
            if joined is not None:
                joined.refresh()


def fuse_layers(model: PreTrainedModel) -> list[FusedLayer]:
    """Join the projections of every layer; at most one layer's weights exist twice at a time."""
    fused = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = (mlp.gate_proj, mlp.up_proj)
        fused.append(
            FusedLayer(
                module=layer,
                qkv=Joined([m.weight for m in qkv]),
                qkv_bias=Joined([m.bias for m in qkv]) if qkv[0].bias is not None else None,
                gate_up=Joined([m.weight for m in gate_up]),
                gate_up_bias=Joined([m.bias for m in gate_up])
                if gate_up[0].bias is not None
                else None,
            )
        )
    return fused
