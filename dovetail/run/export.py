"""A checkpoint as a Hugging Face directory: a run's, or weights alone in Megatron's form; and back
into the latter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dovetail.checkpoint import hf
from dovetail.checkpoint.manager import load_checkpoint
from dovetail.run.megatron import load_offline
from dovetail.run.restored import restore_policy
from dovetail.types import CheckpointError


def export_checkpoint(source: Path, target: Path) -> Path:
    """Write the policy of `source` (a checkpoint, or a directory of them: the newest good one).

    Architecture and tokenizer are those of the model that the run started from.

    Raises:
        CheckpointError: there is no good checkpoint, or the model it started from is gone.
        ConfigError: something else is in the place of `target`.
    """
    hf.check_export_path(target)
    checkpoint = load_checkpoint(source)
    facts = checkpoint.part("loop")[1]
    origin = Path(facts["hf_checkpoint"])
    if not origin.is_dir():
        raise CheckpointError(
            f"{checkpoint.path} was trained from {origin}, which is gone; its configuration and "
            "tokenizer are needed to write a Hugging Face directory. Put it back there"
        )
    trust = bool(facts["trust_remote_code"])
    model = hf.load_model(origin, facts["dtype"], "cpu", trust)
    restore_policy(model, checkpoint)
    return hf.save_hf(model, hf.load_tokenizer(origin, trust), target)


def export_megatron(source: Path, origin: Path, target: Path) -> Path:
    """Write the weights of a checkpoint of Megatron's (torch_dist), whatever ranks saved it.

    Architecture, type of the weights and tokenizer are those of the Hugging Face directory
    `origin`.

    Raises:
        CheckpointError: `source` is no such checkpoint, or of another model than `origin`.
        ConfigError: Megatron does not know the model, or something else is at `target`.
        MissingExtraError: Megatron is not installed.
    """
    hf.check_export_path(target)
    offline = load_offline()
    model = hf.load_model(origin, _dtype(origin), "cpu")
    offline.restore_megatron(model, source)
    return hf.save_hf(model, hf.load_tokenizer(origin), target)


def import_to_megatron(origin: Path, target: Path) -> None:
    """Write the weights of a Hugging Face directory as a checkpoint of Megatron's (torch_dist).

    Raises:
        CheckpointError: weights are missing, or nothing can be written.
        ConfigError: Megatron does not know the model.
        MissingExtraError: Megatron is not installed.
    """
    offline = load_offline()
    offline.write_megatron(hf.model_directory(origin), target, _dtype(origin))


def _dtype(origin: Path) -> Any:
    """That of the model's weights."""
    import torch

    told = json.loads((hf.model_directory(origin) / "config.json").read_bytes())
    name = str(told.get("dtype") or told.get("torch_dtype") or "bfloat16")
    return getattr(torch, name.removeprefix("torch."), torch.bfloat16)
