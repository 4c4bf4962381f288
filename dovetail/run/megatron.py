"""A run's Megatron backend, out of its configuration; imported only where one is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dovetail.config.leaves import cure
from dovetail.config.passthrough import handed
from dovetail.trainers.megatron.passed import check
from dovetail.types.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from dovetail.run.training import TrainerParts
    from dovetail.trainers.megatron.backend import MegatronBackend

PREFIX = "megatron"


def check_megatron(passthrough: Mapping[str, Any]) -> None:
    """Refuse what could never start, without importing Megatron.

    Raises:
        ConfigError: a `--megatron-*` that Megatron does not have, or that the run sets itself.
        MissingExtraError: it is not installed.
    """
    missing = [
        name for name in ("megatron", "mbridge", "einops") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingExtraError(
            f"Megatron's trainer and checkpoints need {', '.join(missing)}; install the extra: "
            "pip install 'dovetail-rl[megatron]'"
        )
    check(handed(passthrough, PREFIX))


def check_device(device: str, answers: bool) -> None:
    """Refuse ranks on which megatron-core could not make a layer; `answers`: a function of the
    user's may answer for CUDA.

    Raises:
        ConfigError: there are no GPUs.
    """
    if not device.startswith("cuda") and not answers:
        raise ConfigError(
            "train_backend 'megatron' needs GPUs, for megatron-core asks CUDA where it means the "
            f"device, and here ranks are processes on a CPU; {cure('train_backend', 'torch')}"
        )


def load_offline() -> ModuleType:
    """`dovetail.trainers.megatron.offline`.

    Raises:
        MissingExtraError: Megatron is not installed.
    """
    check_megatron({})
    with warnings.catch_warnings():
        # Of what it would be faster with, which is nothing for files.
        warnings.simplefilter("ignore")
        return importlib.import_module("dovetail.trainers.megatron.offline")


def make_megatron(parts: TrainerParts, temperature: float, total_steps: int) -> MegatronBackend:
    """One rank's backend; its process is in a group with the others, or trains alone."""
    import torch

    from dovetail.trainers.megatron.backend import MegatronBackend, MegatronModel
    from dovetail.trainers.megatron.hooks import megatron_hooks

    config = parts.config
    check_megatron(parts.passthrough)
    reference = None
    if config.algorithm.needs_reference:
        reference = Path(str(config.model.ref_load or config.model.hf_checkpoint))
    cuda = parts.models.plan.device.startswith("cuda")
    return MegatronBackend(
        MegatronModel(
            directory=Path(str(config.model.hf_checkpoint)),
            dtype=getattr(torch, config.model.dtype),
            trainer=config.trainer,
            passed=handed(parts.passthrough, PREFIX),
            gradient_checkpointing=config.model.gradient_checkpointing,
            seed=config.model.seed,
        ),
        reference,
        config.batch,
        config.optimizer,
        temperature=temperature,
        total_steps=total_steps,
        routing_replay=config.algorithm.routing_replay,
        hooks=megatron_hooks(parts.hooks),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
    )
