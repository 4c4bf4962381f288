"""How many parameters a model has, and where: counted on a model without numbers (meta device), so
for every model that transformers knows, from its config.json alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.|(?:^|\.)h\.\d+\.")
_EXPERTS = re.compile(r"\.experts\.")
_VISION = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model)\.")


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a model, by where splitting puts them."""

    embedding: int = 0
    head: int = 0
    """0: tied to the embedding."""
    layers: int = 0
    """Of all layers, routed experts apart."""
    experts: int = 0
    other: int = 0
    """Last norm, vision tower, ..."""
    num_layers: int = 1
    normed_heads: bool = False
    """Whether queries and keys have norms of their own (Qwen3)."""
    adapters: int = 0
    """Of LoRA; they alone are trained where there are any."""

    @property
    def total(self) -> int:
        """Of the model, without adapters."""
        return self.embedding + self.head + self.layers + self.experts + self.other


def count_parameters(
    model: PreTrainedModel, lora_rank: int = 0, target_modules: Sequence[str] = ("all-linear",)
) -> ParameterCount:
    """Count `model`, whose parameters may have no numbers.

    Args:
        lora_rank: adapters of this rank beside the linear modules of the layers; 0: none.
        target_modules: as the setting of this name.
    """
    counts = dict.fromkeys(("embedding", "head", "layers", "experts", "other"), 0)
    own = _ends(model)
    for name, parameter in model.named_parameters():
        counts[own.get(id(parameter)) or _place(name)] += parameter.numel()
    adapters = sum(
        lora_rank * (module.in_features + module.out_features)
        for name, module in _linear(model)
        if lora_rank and _wanted(name, target_modules)
    )
    return ParameterCount(
        **counts,
        num_layers=int(getattr(model.config.get_text_config(), "num_hidden_layers", 1) or 1),
        normed_heads=any(name.endswith(".q_norm.weight") for name, _ in model.named_parameters()),
        adapters=adapters,
    )


def _ends(model: PreTrainedModel) -> dict[int, str]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {id(embedding.weight): "embedding"}
    if head is not None and head.weight is not embedding.weight:
        found[id(head.weight)] = "head"
    return found


def _place(name: str) -> str:
    if _VISION.search(name) or not _LAYER.search(name):
        return "other"
    return "experts" if _EXPERTS.search(name) else "layers"


def _linear(model: PreTrainedModel) -> list[tuple[str, torch.nn.Linear]]:
    import torch

    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def _wanted(name: str, target_modules: Sequence[str]) -> bool:
    return "all-linear" in target_modules or any(
        name == end or name.endswith(f".{end}") for end in target_modules
    )
