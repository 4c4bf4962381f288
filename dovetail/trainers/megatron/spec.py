"""Which modules Megatron's layers are made of: Transformer Engine's where it is installed, else
megatron-core's own with `dovetail.trainers.megatron.local` in the places of what it lacks."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from dovetail.trainers.megatron.local import CoreAttention, Norm


@cache
def has_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's."""
    return importlib.util.find_spec("transformer_engine") is not None


def block_spec(config: TransformerConfig, vp_stage: int | None = None, on_cpu: bool = False) -> Any:
    """Of the layers of one pipeline stage; Transformer Engine's run on GPUs only."""
    if has_transformer_engine() and not on_cpu:
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, vp_stage=vp_stage
        )
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)
