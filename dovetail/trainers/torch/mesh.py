"""Where one rank of the torch backend stands: its groups, and the meshes that split weights.

    rank = tp + TP * (cp + CP * (dp_shard + SHARD * dp_replicate))

Ranks of one tp or cp group see the same micro-batches. Weights are sharded over dp_shard and cp
together: context parallel ranks need no more than one shard each of what they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dovetail.config.sections import TrainerConfig
from dovetail.trainers.data_parallel import DataParallel
from dovetail.types.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank; a group of one rank is None where it is used for nothing."""

    parallel: DataParallel
    """Over the ranks that have micro-batches of their own."""
    sharding: DeviceMesh
    """What FSDP shards over: one dimension, or copies and shards."""
    tp: DeviceMesh | None
    cp: dist.ProcessGroup | None
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def device(self) -> torch.device:
        """Where passes run."""
        return torch.device(self.sharding.device_type)


def make_mesh(config: TrainerConfig, rank: int, world: int, device: str) -> Mesh:
    """The groups of `rank` among `world`, all of which call this together.

    Raises:
        ConfigError: the sizes do not divide the ranks, or are Megatron's.
    """
    tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
    copies = config.dp_replicate_size
    if config.pipeline_model_parallel_size * config.expert_model_parallel_size != 1:
        raise ConfigError(
            "pipeline_model_parallel_size and expert_model_parallel_size need --train-backend "
            "megatron (TOML: trainer.train_backend); the torch backend shards experts like all "
            "other weights"
        )
    shards, left = divmod(world, copies * cp * tp)
    if left or not shards:
        raise ConfigError(
            f"{world} trainer ranks can't be split into {copies} copies x {cp} context parallel x "
            f"{tp} tensor parallel: the product, {copies * cp * tp}, must divide the ranks; change "
            "--dp-replicate-size, --context-parallel-size or --tensor-model-parallel-size (TOML: "
            "trainer)"
        )
    whole = init_device_mesh(
        device, (copies, shards * cp, tp), mesh_dim_names=("copies", "shards", "tp")
    )
    ranks = torch.arange(world).reshape(copies * shards, cp, tp)
    dp_groups = [ranks[:, j, k].tolist() for j in range(cp) for k in range(tp)]
    cp_groups = [ranks[i, :, k].tolist() for i in range(copies * shards) for k in range(tp)]
    dp_rank, cp_rank = rank // (tp * cp), rank // tp % cp
    return Mesh(
        DataParallel(dp_rank, copies * shards, _own_group(rank, dp_groups)),
        whole["copies", "shards"] if copies > 1 else whole["shards"],
        whole["tp"] if tp > 1 else None,
        _own_group(rank, cp_groups),
        cp_rank,
        cp,
    )


def _own_group(rank: int, groups: list[list[int]]) -> dist.ProcessGroup | None:
    """All ranks make all groups, in one order."""
    if len(groups[0]) == 1:
        return None
    made = [dist.new_group(ranks) for ranks in groups]
    return next(made[i] for i, ranks in enumerate(groups) if rank in ranks)
