"""A model's weights under the names that its Hugging Face files have, one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dovetail.checkpoint.adapters import merged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LAYER = re.compile(r".*?\.\d+\.")


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight as `save_pretrained` would write it: tied ones once, experts that the model
    keeps in one tensor apart again, adapters merged in.

    What needs no turning is the model's own tensor, not a copy; of what does, a layer at a time is
    in memory.
    """
    for layer in _by_layer(model):
        yield from turned(model, layer).items()


def turned(model: PreTrainedModel, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of `model` as its Hugging Face files have them, adapters merged in."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, merged(model, own))
    return found


def merged_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by the name that the same model without adapters has for it: tied ones once,
    adapters merged in, a layer at a time."""
    for layer in _by_layer(model):
        yield from merged(model, layer).items()


def num_bytes(model: PreTrainedModel) -> int:
    """Of all that `named_tensors` gives."""
    return sum(tensor.nbytes for layer in _by_layer(model) for tensor in layer.values())


def _by_layer(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    # A name may be meant to be tied, and in this model not be.
    first = {_place(tensor): name for name, tensor in own.items() if name not in tied}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in own.items():
        if tensor.is_meta and name in tied:
            continue
        if first.setdefault(_place(tensor), name) == name:
            found = _LAYER.match(name)
            layers.setdefault(found[0] if found else "", {})[name] = tensor
    yield from layers.values()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for names of the same values."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
