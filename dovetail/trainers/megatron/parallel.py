"""The groups of ranks that Megatron splits a model over, and our view of who has a piece of the
results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from dovetail.config.sections import TrainerConfig
from dovetail.trainers.data_parallel import DataParallel
from dovetail.types.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's place in each way of splitting."""

    tp: int
    tp_size: int
    pp: int
    pp_size: int
    cp: int
    cp_size: int
    data: DataParallel
    """Ranks that see other rows or hold other layers; those that split a layer or a sequence know
    the same numbers."""
    device: torch.device


def join(config: TrainerConfig, num_layers: int, seed: int, device: torch.device) -> Ranks:
    """Form Megatron's groups over the ranks of the default process group, which a process that
    trains alone need not have.

    Raises:
        RuntimeError: the sizes do not divide the ranks, which `dovetail.config.size_rules` tells
            before a run begins.
        ConfigError: see `virtual_stages`.
    """
    leave()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config, num_layers),
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(config.distributed_timeout_minutes)),
    )
    if device.type == "cuda":
        seed_layers(seed)
    return Ranks(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        data=_data_parallel(),
        device=device,
    )


def seed_layers(seed: int) -> None:
    """The generators of layers, which megatron-core keeps on CUDA."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def leave() -> None:
    """Give up Megatron's groups, if there are any."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def virtual_stages(config: TrainerConfig, num_layers: int) -> int | None:
    """Interleaved stages of each pipeline rank; None: no interleaving.

    Raises:
        ConfigError: the layers can't be split like that.
    """
    own, ranks = config.num_layers_per_virtual_pipeline_stage, config.pipeline_model_parallel_size
    if num_layers % ranks:
        raise ConfigError(
            f"{num_layers} layers can't be split over {ranks} pipeline stages; choose another "
            "--pipeline-model-parallel-size (TOML: trainer.pipeline_model_parallel_size)"
        )
    if own is None:
        return None
    if ranks == 1 or (num_layers // ranks) % own:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage {own} does not divide the {num_layers // ranks}"
            f" layers of each of {ranks} pipeline ranks, of which there must be 2 or more; change "
            "--num-layers-per-virtual-pipeline-stage "
            "(TOML: trainer.num_layers_per_virtual_pipeline_stage)"
        )
    stages = num_layers // ranks // own
    return stages if stages > 1 else None


def all_ranks() -> DataParallel:
    """Every rank, each with a piece of its own."""
    return DataParallel(group=dist.group.WORLD)


def _data_parallel() -> DataParallel:
    """Every rank whose place among the tensor and context parallel ones is this one's."""
    place = [
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    ]
    places = all_ranks().told(place)
    own = None
    for one in sorted(set(map(tuple, places))):
        members = [rank for rank, its in enumerate(places) if tuple(its) == one]
        # Every rank takes part in making every group.
        group = dist.new_group(members)
        if one == tuple(place):
            own = group if len(members) > 1 else None
    return DataParallel(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        own,
    )
