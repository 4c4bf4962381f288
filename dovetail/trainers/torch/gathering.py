"""Which weights of a sharded model are gathered together for engines and files.

A unit that is larger than what may be gathered at a time goes in pieces. What the names of the
Hugging Face files turn together (adapters with their matrix, gate and up of experts) stays
together: a piece may be larger than allowed where that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dovetail.checkpoint.adapters import plain_name
from dovetail.checkpoint.hf_names import turned

Shapes = Mapping[str, torch.Tensor]
"""Of weights by name, without values: on the meta device."""


def pieces(model: Any, unit: Shapes, most_bytes: int) -> list[list[str]]:
    """The names of a unit in pieces of at most so many bytes, where that can be.

    All in one piece where parts of it would not be turned as the whole is.
    """
    whole = [list(unit)]
    if sum(tensor.nbytes for tensor in unit.values()) <= most_bytes:
        return whole
    found = _filled(list(_families(unit)), unit, most_bytes)
    one_by_one: dict[str, torch.Size] = {}
    for names in found:
        one_by_one |= _shapes(turned(model, {name: unit[name] for name in names}))
    return found if one_by_one == _shapes(turned(model, unit)) else whole


def gathered(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A sharded weight, whole on every rank, which all call this; in a type for passes.

    Args:
        device: where ranks talk; shards may be kept elsewhere.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    local = tensor.to_local().detach()
    kind = dtype if local.is_floating_point() else local.dtype
    shard = DTensor.from_local(
        local.to(device, kind),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return shard.full_tensor()


def _families(unit: Shapes) -> Iterator[list[str]]:
    """Names of one module each; a matrix with its adapters is one."""
    found: dict[str, list[str]] = {}
    for name in unit:
        found.setdefault(_module_of(name), []).append(name)
    yield from found.values()


def _module_of(name: str) -> str:
    for mark in (".lora_A.", ".lora_B."):
        if mark in name:
            return name.partition(mark)[0]
    return plain_name(name).rpartition(".")[0]


def _filled(families: Sequence[list[str]], unit: Shapes, most_bytes: int) -> list[list[str]]:
    found: list[list[str]] = []
    room = 0
    for names in families:
        size = sum(unit[name].nbytes for name in names)
        if not found or size > room:
            found.append([])
            room = most_bytes
        found[-1] += names
        room -= size
    return found


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
