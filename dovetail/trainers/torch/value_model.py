"""A language model that says what each state is worth: a value head on its last hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dovetail.types.errors import CheckpointError

HEAD_FILE = "value_head.safetensors"
"""Beside the weights of an exported critic."""


def add_value_head(
    model: Any, directory: Path | str | None = None, device: torch.device | None = None
) -> None:
    """Give a causal LM a `value_head`: hidden size to one float32 number.

    It is read from `directory` where an exported critic left one, and is 0 otherwise, so that a new
    critic expects nothing. The language head is frozen unless it shares its weights with the input.

    Raises:
        CheckpointError: the file does not fit the model.
    """
    weights = model.get_input_embeddings().weight
    head = torch.nn.Linear(
        model.config.get_text_config().hidden_size,
        1,
        device=device or weights.device,
        dtype=torch.float32,
    )
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    file = None if directory is None else Path(directory) / HEAD_FILE
    if file is not None and file.is_file():
        _read_head(head, file)
    model.value_head = head
    output = model.get_output_embeddings()
    if output is not None and output.weight is not weights:
        output.requires_grad_(False)


def _read_head(head: torch.nn.Linear, file: Path) -> None:
    try:
        found = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise _no_head(file, f"it can't be read: {error}") from error
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    expected = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    if shapes != expected:
        raise _no_head(file, f"it has {shapes}, expected {expected}")
    head.load_state_dict(found)


def _no_head(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is no value head of this model: {problem}; use the --critic-load directory (TOML: "
        "critic.critic_load) of a run with the same model, or take the file away"
    )


@contextlib.contextmanager
def without_head(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The model as it was before it got its head, whose tensors are given, for an export."""
    head = model.value_head
    del model.value_head
    try:
        yield {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
    finally:
        model.value_head = head
