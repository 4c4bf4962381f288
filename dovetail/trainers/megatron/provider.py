"""Builds the stages of a model that this rank has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule

from dovetail.config.sections import TrainerConfig
from dovetail.trainers.megatron.architecture import model_arguments
from dovetail.trainers.megatron.passed import Target, settings_of
from dovetail.trainers.megatron.spec import block_spec
from dovetail.types.errors import ConfigError

Provider = Callable[..., Any]
"""`(pre_process=, post_process=, vp_stage=) -> module`."""


def build(
    config: TransformerConfig,
    hf_config: Any,
    device: torch.device,
    provider: Provider | None = None,
) -> list[MegatronModule]:
    """One module for each virtual stage, weights not yet loaded, on `device`.

    `provider`: makes the modules in place of `GPTModel` as this backend builds it.

    Raises:
        ConfigError: the provider's object is no module of Megatron's.
    """
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if stages is None else range(stages):
        ends = {"ignore_virtual": stage is None, "vp_stage": stage}
        named = {
            "pre_process": parallel_state.is_pipeline_first_stage(**ends),
            "post_process": parallel_state.is_pipeline_last_stage(**ends),
        }
        if provider is None:
            on_cpu = device.type == "cpu"
            chunk = gpt_model(config, hf_config, stage, **named, on_cpu=on_cpu)
            leave_pad_alone(chunk, hf_config)
        else:
            chunk = _provided(provider(**named, vp_stage=stage, config=config, pg_collection=None))
        chunk.vp_stage = stage
        chunks.append(chunk.to(device))
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunks


def gpt_model(
    config: TransformerConfig,
    hf_config: Any,
    vp_stage: int | None,
    *,
    pre_process: bool,
    post_process: bool,
    on_cpu: bool = False,
) -> GPTModel:
    """One stage of Megatron's own decoder."""
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage, on_cpu),
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        vp_stage=vp_stage,
        **model_arguments(hf_config, config.tensor_model_parallel_size),
    )


def leave_pad_alone(chunk: Any, hf_config: Any) -> None:
    """What the padding token's embedding gives carries no gradient, as in transformers' models
    (`padding_idx`); without this the backends would differ where samples have that token."""
    pad = getattr(hf_config, "pad_token_id", None)
    if pad is None or not chunk.pre_process:
        return

    def stop(module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        is_pad = given[0] == pad
        if module.reduce_scatter_embeddings:
            # [b, s] became [s, b], of which each tensor-parallel rank has a part.
            size = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
            is_pad = is_pad.t().chunk(size)[rank]
        return torch.where(is_pad[..., None], output.detach(), output)

    chunk.embedding.word_embeddings.register_forward_hook(stop)


def in_low_precision(config: TransformerConfig, chunks: list[Any]) -> list[Any]:
    """With bfloat16 weights, each in a module that turns its inputs."""
    if not config.bf16:
        return chunks
    return [Float16Module(config, chunk) for chunk in chunks]


def with_gradients(
    config: TransformerConfig,
    chunks: list[Any],
    trainer: TrainerConfig,
    passed: Mapping[str, Any],
) -> list[DistributedDataParallel]:
    """Each in Megatron's data parallelism: gradients are summed in float32."""
    settings = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": trainer.use_distributed_optimizer,
        "overlap_grad_reduce": False,
        **settings_of(passed, Target.DDP),
    }
    ddp = DistributedDataParallelConfig(**settings)
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def bare(chunk: Any) -> Any:
    """The model inside its wrappers."""
    while isinstance(chunk, DistributedDataParallel | Float16Module):
        chunk = chunk.module
    return chunk


def _provided(chunk: Any) -> Any:
    if not isinstance(chunk, MegatronModule):
        raise ConfigError(
            f"--custom-model-provider-path: the function gave back a {type(chunk).__name__}, "
            "expected a module of Megatron's, e.g. megatron.core.models.gpt.GPTModel"
        )
    return chunk
