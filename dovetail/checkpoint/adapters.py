"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) on a model's matrices, and weights with
them merged in.

peft puts a module of its own around each matrix: `x.weight` becomes `x.base_layer.weight`, beside
`x.lora_A.default.weight` [r, in] and `x.lora_B.default.weight` [out, r].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BASE, LOW, HIGH = ".base_layer.", ".lora_A.default.", ".lora_B.default."
FOLDER = "adapter"
"""Of an export: the adapters alone, in peft's form. Beside the weights transformers would add them
to those that have them already."""


def is_adapter(name: str) -> bool:
    """Whether this weight is part of an adapter."""
    return LOW in name or HIGH in name


def plain_name(name: str) -> str:
    """The name that a weight has without adapters."""
    return name.replace(BASE, ".")


def merged(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """These weights of `model` by the names that they have without adapters, each
    `base + scaling * B A`, computed in float32; those without an adapter are not copied."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if is_adapter(name):
            continue
        own, is_wrapped, kind = name.rpartition(BASE)
        low = weights.get(f"{own}{LOW}{kind}")
        if is_wrapped and low is not None:
            scaling = float(model.get_submodule(own).scaling["default"])
            delta = weights[f"{own}{HIGH}{kind}"].float() @ low.float()
            weight = (weight.float() + scaling * delta).to(weight.dtype)
        found[plain_name(name)] = weight
    return found


def save_adapter(
    directory: Path, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write adapters as peft does, for `PeftModel.from_pretrained(base, directory)`.

    Args:
        settings: of peft's `LoraConfig`, as plain data.
        weights: by their names in the model.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    named = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous().cpu()
        for name, tensor in weights.items()
    }
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(dict(settings), indent=2) + "\n")
