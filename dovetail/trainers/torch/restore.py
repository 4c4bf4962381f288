"""The weights of a saved policy back into a model, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

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
