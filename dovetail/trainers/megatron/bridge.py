"""Hugging Face weights into Megatron's modules and back, through mbridge's tables of names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mbridge.core.bridge import Bridge
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge, Qwen3MoEBridge
from megatron.core.transformer import TransformerConfig

from dovetail.trainers.megatron.architecture import is_tied, padded_vocab
from dovetail.types.errors import CheckpointError

_BRIDGES: dict[str, type[Bridge]] = {
    "llama": LLaMABridge,
    "qwen2": Qwen2Bridge,
    "qwen3": Qwen3Bridge,
    "qwen3_moe": Qwen3MoEBridge,
}
_LAYER_NORM = re.compile(r"(layers\.\d+\.)input_layernorm\.weight")
_EXPERT = re.compile(r"local_experts\.(\d+)\.(linear_fc\d)\.weight")


class Weights:
    """Between the modules of this rank and whole tensors under Hugging Face names."""

    def __init__(self, config: TransformerConfig, hf_config: Any, dtype: torch.dtype):
        self.bridge = _bridge(config, hf_config, dtype)

    @torch.no_grad()
    def load(self, chunks: Sequence[Any], directory: Path | str) -> None:
        """Read this rank's part of a Hugging Face directory. Of the ranks that split a layer one
        reads and the others are sent theirs.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        try:
            self.bridge.load_weights(list(chunks), str(directory))
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the weights in {directory} are not those of its config.json: "
                f"{type(error).__name__}: {error}. Give a directory in Hugging Face form to "
                "--hf-checkpoint (TOML: model.hf_checkpoint)"
            ) from error

    @torch.no_grad()
    def tensors(self, chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, whole, on every rank; one at a time. All ranks iterate together."""
        seen: set[str] = set()
        for name, tensor in self.bridge.export_weights(list(chunks)):
            if name not in seen:
                seen.add(name)
                yield name, tensor.detach()


def _bridge(config: TransformerConfig, hf_config: Any, dtype: torch.dtype) -> Bridge:
    base = _BRIDGES[hf_config.model_type]
    moe = config.num_moe_experts
    direct = dict(base._DIRECT_MAPPING)
    if is_tied(hf_config):
        # A stage with a head and no embedding has a copy of it.
        direct["output_layer.weight"] = "model.embed_tokens.weight"

    class Adapted(base):  # type: ignore[misc, valid-type]
        # A dictionary of its own: mbridge changes that of its class.
        _DIRECT_MAPPING = direct

        def _build_config(self) -> TransformerConfig:
            return config

        def _adjust_mapping_for_shared_weights(self) -> None:
            return None

        def _weight_name_mapping_mcore_local_to_global(
            self, model: Any, consider_ep: bool = True
        ) -> dict[str, str]:
            own = super()._weight_name_mapping_mcore_local_to_global(model, consider_ep=False)
            return {name: self._engine_name(found, consider_ep) for name, found in own.items()}

        def _engine_name(self, name: str, consider_ep: bool) -> str:
            """As Transformer Engine's modules are called, which mbridge knows."""
            if not moe:
                name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
            name = _LAYER_NORM.sub(r"\1self_attention.linear_qkv.layer_norm_weight", name)
            expert = _EXPERT.search(name)
            first = self.mpu.ep_rank * (moe // self.mpu.ep_size) if moe and consider_ep else 0
            if expert is not None:
                number = int(expert[1]) + first
                return name.replace(expert[0], f"{expert[2]}.weight{number}")
            grouped = re.search(r"(\.experts\.linear_fc\d\.weight)(\d+)$", name)
            if grouped is not None:
                return f"{name[: grouped.start()]}{grouped[1]}{int(grouped[2]) + first}"
            return name

    bridge = Adapted(hf_config, dtype=dtype, make_vocab_size_divisible_by=1)
    bridge.vocab_size = hf_config.vocab_size
    bridge.padded_vocab_size = padded_vocab(hf_config.vocab_size, config.tensor_model_parallel_size)
    return bridge
