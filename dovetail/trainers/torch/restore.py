"""The weights of a saved policy back into a model, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dovetail.trainers.torch.saving import FORMAT, ShardFiles, check_format
from dovetail.types.errors import CheckpointError


@torch.no_grad()
def restore_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Round the master weights of a trainer's saved state into `model`, in place.

    Weights that were frozen in training are not in the state, and stay.

    Raises:
        CheckpointError: the state belongs to another model.
    """
    params = dict(model.named_parameters())
    masters = {
        key.removeprefix("master."): tensor
        for key, tensor in tensors.items()
        if key.startswith("master.")
    }
    for name, tensor in masters.items():
        if name not in params or params[name].shape != tensor.shape:
            got = tuple(params[name].shape) if name in params else "no such weight"
            raise CheckpointError(
                f"the checkpoint has {name} of shape {tuple(tensor.shape)}, the model {got}; "
                "it was trained from another model (--hf-checkpoint, TOML: model.hf_checkpoint)"
            )
        params[name].copy_(tensor)


def restore_sharded(model: torch.nn.Module, directory: Path, facts: Mapping[str, Any]) -> None:
    """As `restore_weights`, of what ranks of the torch backend wrote into `directory`.

    Raises:
        CheckpointError: another kind of backend wrote it, it is damaged, or of another model.
    """
    check_format(facts, FORMAT, "this command")
    saved = _saved_names(directory)
    masters = {
        f"master.{name}": torch.empty(param.shape)
        for name, param in model.named_parameters()
        if name in saved
    }
    ShardFiles().read(directory, masters)
    restore_weights(model, masters)


def _saved_names(directory: Path) -> set[str]:
    """Of the weights that the files have a master of."""
    found: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {key.removeprefix("master.") for key in opened.keys()}  # noqa: SIM118
    return found
