"""The sizes of a model, from its Hugging Face `config.json` alone: no weights, and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.types.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides how a model can be split. None: the configuration does not say."""

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate: int | None = None
    """Inner width of a dense MLP."""
    vocab: int | None = None
    experts: int | None = None
    """Routed experts of a layer; None or 0: a dense model."""
    experts_per_token: int = 0
    expert_intermediate: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a parsed `config.json`; of a model with a vision tower the text part counts."""
        own = config.get("text_config") or config
        heads = _first(own, "num_attention_heads", "n_head")
        hidden = _first(own, "hidden_size", "n_embd")
        head_dim = _first(own, "head_dim")
        if head_dim is None and heads and hidden:
            head_dim = hidden // heads
        return cls(
            layers=_first(own, "num_hidden_layers", "n_layer"),
            hidden=hidden,
            heads=heads,
            kv_heads=_first(own, "num_key_value_heads") or heads,
            head_dim=head_dim,
            intermediate=_first(own, "intermediate_size", "n_inner"),
            vocab=_first(own, "vocab_size"),
            experts=_first(own, "num_experts", "num_local_experts", "n_routed_experts"),
            experts_per_token=_first(own, "num_experts_per_tok", "experts_per_token") or 0,
            expert_intermediate=_first(own, "moe_intermediate_size", "intermediate_size") or 0,
        )

    @classmethod
    def read(cls, directory: str | Path) -> ModelShape | None:
        """Of the model in `directory`; None where there is no such directory.

        Raises:
            ConfigError: its config.json is missing or no JSON object.
        """
        path = Path(directory) / "config.json"
        if not path.parent.is_dir():
            return None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} can't be read ({error}); expected a Hugging Face model directory: "
                f"{cure('hf_checkpoint', 'DIR')}"
            ) from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path} is no JSON object; {cure('hf_checkpoint', 'DIR')}")
        return cls.from_config(config)

    @property
    def kv_elements(self) -> int | None:
        """Numbers that one token leaves in the KV cache: 2 x layers x kv heads x head size."""
        if self.layers is None or self.kv_heads is None or self.head_dim is None:
            return None
        return 2 * self.layers * self.kv_heads * self.head_dim


def shape_of(config: RunConfig) -> ModelShape | None:
    """Of the policy, where its directory is on this machine; None in mode local, which splits
    nothing.

    Raises:
        ConfigError: see `ModelShape.read`.
    """
    path = config.model.hf_checkpoint
    return None if path is None or config.runtime.mode == "local" else ModelShape.read(path)


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
