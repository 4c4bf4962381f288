"""The weights of a saved policy back into a model, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dovetail.checkpoint.adapters import HIGH, LOW, is_adapter
from dovetail.trainers.torch.saving import FORMAT, ShardFiles, check_format
from dovetail.types.errors import CheckpointError

_MASTER = "master."


@torch.no_grad()
def restore_weights(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Round the master weights of a trainer's saved state into `model`, in place; adapters are
    added to the weights that they are of, scaled as `facts` of the state say.

    Weights that were frozen in training are not in the state, and stay.

    Raises:
        CheckpointError: the state belongs to another model.
    """
    params = dict(model.named_parameters())
    masters = {
        key.removeprefix(_MASTER): tensor
        for key, tensor in tensors.items()
        if key.startswith(_MASTER)
    }
    scaling = float((facts or {}).get("lora_scaling", 0.0))
    for name, low in masters.items():
        if LOW in name:
            base = name.replace(LOW, ".")
            delta = scaling * masters[name.replace(LOW, HIGH)] @ low
            _check(params, base, delta)
            params[base].copy_(params[base].float() + delta.to(params[base].device))
    for name, tensor in masters.items():
        if not is_adapter(name):
            _check(params, name, tensor)
            params[name].copy_(tensor)


def restore_sharded(model: torch.nn.Module, directory: Path, facts: Mapping[str, Any]) -> None:
    """As `restore_weights`, of what ranks of the torch backend wrote into `directory`.

    Raises:
        CheckpointError: another kind of backend wrote it, it is damaged, or of another model.
    """
    check_format(facts, FORMAT, "this command")
    restore_weights(model, ShardFiles().read_whole(directory, _MASTER), facts)


def _check(params: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    if name not in params or params[name].shape != tensor.shape:
        got = tuple(params[name].shape) if name in params else "no such weight"
        raise CheckpointError(
            f"the checkpoint has {name} of shape {tuple(tensor.shape)}, the model {got}; "
            "it was trained from another model (--hf-checkpoint, TOML: model.hf_checkpoint)"
        )
