"""Megatron's checkpoints and Hugging Face directories into each other: in one process, on the CPU,
without ranks, optimizer or GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from dovetail.checkpoint.files import put_in_place, remove_tree
from dovetail.checkpoint.hf_weights import fitted
from dovetail.config.sections import TrainerConfig
from dovetail.trainers.megatron import provider, saving
from dovetail.trainers.megatron.architecture import transformer_config
from dovetail.trainers.megatron.bridge import Weights
from dovetail.trainers.megatron.parallel import join, leave
from dovetail.types.errors import CheckpointError


def write_megatron(source: Path, target: Path, dtype: torch.dtype) -> None:
    """The weights of a Hugging Face directory as a checkpoint of Megatron's (torch_dist), which
    appears whole under `target`.

    Raises:
        ConfigError: the model is none that this backend knows.
        CheckpointError: weights are missing, or nothing can be written.
    """
    target = target.absolute()
    aside = target.with_name(f".unfinished-{target.name}")
    with _whole_model(source, dtype) as (chunks, weights):
        weights.load(chunks, source)
        try:
            remove_tree(aside)
            aside.mkdir(parents=True)
            saving.write_weights(chunks, aside)
            put_in_place(aside, target, target.with_name(f".replaced-{target.name}"))
        except OSError as error:
            raise CheckpointError(f"{target} can't be written: {error}") from error
        finally:
            remove_tree(aside)


@torch.no_grad()
def restore_megatron(model: Any, directory: Path) -> None:
    """Put the weights of a checkpoint of Megatron's, whatever ranks wrote it, into a model of
    transformers, in place.

    Raises:
        ConfigError: the model is none that this backend knows.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    with _whole_model(Path(model.name_or_path), model.dtype) as (chunks, weights):
        saving.read_weights(chunks, directory)
        named = dict(weights.tensors(chunks))
    cure = f"It is not a checkpoint of {model.name_or_path}"
    found = fitted(named, model, f"the weights in {directory}", cure)
    for name, parameter in model.named_parameters():
        parameter.copy_(found[name])


@contextmanager
def _whole_model(directory: Path, dtype: torch.dtype) -> Iterator[tuple[list[Any], Weights]]:
    """Megatron's modules of a Hugging Face directory, without its weights."""
    hf_config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    alone, cpu = TrainerConfig(train_backend="megatron"), torch.device("cpu")
    config = transformer_config(hf_config, alone, dtype, on_cpu=True)
    # The usual one, which nothing is sent through here, makes a CUDA stream when it is made.
    config.moe_token_dispatcher_type = "allgather"
    joins = not dist.is_initialized()
    try:
        join(alone, hf_config.num_hidden_layers, 0, cpu)
        yield provider.build(config, hf_config, cpu), Weights(config, hf_config, dtype)
    finally:
        leave()
        if joins and dist.is_initialized():
            dist.destroy_process_group()
