"""A Hugging Face configuration as Megatron's: which models there are, and what is told to
`TransformerConfig` and `GPTModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from dovetail.config.sections import TrainerConfig
from dovetail.trainers.megatron.parallel import virtual_stages
from dovetail.trainers.megatron.passed import transformer_settings
from dovetail.types.errors import ConfigError

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""`model_type` of the configurations that this backend knows."""
_MOE = ("qwen3_moe",)
_LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
"""Megatron has these as constants."""


def check_supported(hf_config: Any) -> None:
    """Refuse what this backend would train wrongly.

    Raises:
        ConfigError: another architecture, or a part of it that Megatron's GPTModel has not.
    """
    kind = hf_config.model_type
    if kind not in SUPPORTED:
        raise ConfigError(
            f"the Megatron backend does not know models of type {kind!r}; it knows "
            f"{', '.join(SUPPORTED)}. Use --train-backend torch (TOML: trainer.train_backend), "
            "which trains any causal LM of transformers"
        )
    strange = {
        "hidden_act": hf_config.hidden_act not in ("silu", "swish"),
        "mlp_bias": getattr(hf_config, "mlp_bias", False),
        "attention_bias": kind in ("llama", "qwen3", "qwen3_moe")
        and getattr(hf_config, "attention_bias", False),
        "use_sliding_window": getattr(hf_config, "use_sliding_window", False),
        "mlp_only_layers": bool(getattr(hf_config, "mlp_only_layers", None)),
        "decoder_sparse_step": getattr(hf_config, "decoder_sparse_step", 1) != 1,
    }
    for name in (name for name, is_strange in strange.items() if is_strange):
        raise ConfigError(
            f"the model's {name} is {getattr(hf_config, name)!r}, which the Megatron backend does "
            "not know; use --train-backend torch (TOML: trainer.train_backend)"
        )
    _rope(hf_config)


def transformer_config(
    hf_config: Any,
    config: TrainerConfig,
    dtype: torch.dtype,
    passed: Mapping[str, Any] | None = None,
    *,
    gradient_checkpointing: bool = False,
    on_cpu: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of the model, split as `config` says.

    `passed`: the user's `--megatron-*`, without prefix. `on_cpu`: where weights are made.

    Raises:
        ConfigError: see `check_supported`; or Megatron refuses a setting.
    """
    check_supported(hf_config)
    if hf_config.model_type in _MOE and config.tensor_model_parallel_size > 1:
        _check_experts(config)
    settings = {
        **_model(hf_config),
        **_split(hf_config, config, dtype),
        **_numerics(dtype, on_cpu),
        **(_RECOMPUTED if gradient_checkpointing else {}),
        **transformer_settings(passed or {}),
    }
    try:
        return TransformerConfig(**settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Megatron refuses the configuration of this model: {error}; change the --megatron-* "
            "flags (TOML: [megatron]) or the sizes in [trainer]"
        ) from error


def _check_experts(config: TrainerConfig) -> None:
    if not config.sequence_parallel:
        raise ConfigError(
            "a mixture of experts on tensor-parallel ranks needs sequence parallelism in Megatron; "
            "add --sequence-parallel (TOML: trainer.sequence_parallel = true)"
        )


_RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def _model(hf_config: Any) -> dict[str, Any]:
    heads = hf_config.num_attention_heads
    settings = {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        "ffn_hidden_size": hf_config.intermediate_size,
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": hf_config.model_type == "qwen2",
        "qk_layernorm": hf_config.model_type in ("qwen3", "qwen3_moe"),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if hf_config.model_type not in _MOE:
        return settings
    return settings | {
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
    }


def _split(hf_config: Any, config: TrainerConfig, dtype: torch.dtype) -> dict[str, Any]:
    stages = virtual_stages(config, hf_config.num_hidden_layers)
    pipelined = config.pipeline_model_parallel_size > 1
    return {
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "sequence_parallel": config.sequence_parallel and config.tensor_model_parallel_size > 1,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": stages,
        "context_parallel_size": config.context_parallel_size,
        "expert_model_parallel_size": config.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.expert_tensor_parallel_size,
        "pipeline_dtype": dtype if pipelined else None,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # Micro-batches are packed lines of any length.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # Batched p2p of two interleaved ranks swaps what goes forward and backward.
        "overlap_p2p_comm": stages is not None,
        "batch_p2p_comm": stages is None and pipelined,
        # The loss's weights are those of the whole step: nothing is averaged.
        "calculate_per_token_loss": True,
    }


def _numerics(dtype: torch.dtype, on_cpu: bool) -> dict[str, Any]:
    return {
        "use_cpu_initialization": on_cpu,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "attention_softmax_in_fp32": True,
        "autocast_dtype": dtype,
        # The default is a deprecated name of the same, of which megatron-core warns.
        "cuda_graph_scope": [],
    }


def model_arguments(hf_config: Any, tp_size: int) -> dict[str, Any]:
    """What `GPTModel` is told beside its configuration."""
    return {
        "vocab_size": padded_vocab(hf_config.vocab_size, tp_size),
        "max_sequence_length": hf_config.max_position_embeddings,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": is_tied(hf_config),
        **_rope(hf_config),
    }


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding: as many on every tensor-parallel rank."""
    return math.ceil(vocab_size / tp_size) * tp_size


def is_tied(hf_config: Any) -> bool:
    """Whether the head is the embedding."""
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def _rope(hf_config: Any) -> dict[str, Any]:
    given = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = given.get("rope_type", "default")
    base = {"rotary_base": given.get("rope_theta", 10000.0)}
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        kind = "partial"
    if kind == "default":
        return base
    if kind == "linear":
        return base | {"seq_len_interpolation_factor": given["factor"]}
    if kind == "llama3" and all(given.get(name) == value for name, value in _LLAMA3_ROPE.items()):
        return base | {"rope_scaling": True, "rope_scaling_factor": given["factor"]}
    raise ConfigError(
        f"the model's rotary embedding is {given}, which the Megatron backend does not know; it "
        "knows default, linear, and llama3 with the factors of Llama 3.1. Use --train-backend "
        "torch (TOML: trainer.train_backend)"
    )
