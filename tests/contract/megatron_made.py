"""The Megatron backend's maker for `trained`: in spawned ranks only, since megatron-core is made to
run on a CPU there."""

from pathlib import Path

import torch

from dovetail.config.sections import (
    AlgorithmConfig,
    BatchConfig,
    OptimizerConfig,
    TrainerConfig,
)
from tests import megatron_shim

megatron_shim.install()

from dovetail.trainers.megatron.backend import MegatronBackend, MegatronModel  # noqa: E402
from dovetail.trainers.trainer import Trainer  # noqa: E402


def low(rank, world, case):
    """With bfloat16 weights, float32 masters and gradients."""
    return megatron(rank, world, case, dtype=torch.bfloat16)


def megatron(rank, world, case, dtype=torch.float32, hooks=None):
    """The trainer of one rank."""
    settings, layout = dict(case.settings), dict(case.layout)
    passed = layout.pop("passed", {})
    checkpointing = layout.pop("gradient_checkpointing", False)
    algorithm = AlgorithmConfig(**settings.pop("algorithm", {}))
    rates = OptimizerConfig(**{"lr": 1e-2, **settings.pop("optimizer", {})})
    backend = MegatronBackend(
        MegatronModel(
            directory=Path(case.policy),
            dtype=dtype,
            trainer=TrainerConfig(train_backend="megatron", **layout),
            passed=passed,
            gradient_checkpointing=checkpointing,
        ),
        Path(case.reference) if algorithm.needs_reference else None,
        BatchConfig(**settings.pop("batch", {})),
        rates,
        temperature=1.0,
        total_steps=None,
        routing_replay=algorithm.routing_replay,
        hooks=hooks,
    )
    own = {"pad_token_id": 0, "samples_per_optimizer_step": 10**6, **settings}
    return Trainer(backend, algorithm, temperature=1.0, **own)
