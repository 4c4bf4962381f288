"""Impossible combinations of who lives where, and settings of it without effect. As in
`dovetail.config.check` and `dovetail.config.notes`, whose rules and notes these are."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig

_OF_CLUSTERS = {
    "runtime": (
        "ray_address",
        "actor_num_nodes",
        "actor_num_gpus_per_node",
        "num_gpus_per_node",
        "rollout_num_gpus",
        "rollout_num_gpus_per_engine",
        "offload_train",
        "offload_rollout",
        "max_trainer_restarts",
    ),
    "trainer": (
        "dp_replicate_size",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "use_distributed_optimizer",
        "fsdp_cpu_offload",
        "distributed_backend",
        "distributed_timeout_minutes",
    ),
    "checkpoint": ("async_save",),
}
"""By section: what only a trainer of several ranks reads."""


_ADDRESS = re.compile(r"auto|(\[[0-9A-Fa-f:.]+\]|[^\s:/]+):\d+")


def placement_rules(config: RunConfig) -> Iterator[str]:
    """Ways of living together that can't be."""
    address = config.runtime.ray_address
    if config.runtime.mode != "local" and address and not _ADDRESS.fullmatch(address):
        yield (
            f"ray_address got {address!r}, expected HOST:PORT of a Ray head (its port is 6379 "
            f"unless it was told another) or auto; {cure('ray_address', 'HOST:6379')}, or leave it "
            "out and the run starts a Ray of its own"
        )
    if config.trainer.lora_rank:
        yield from _adapter_rules(config)
    if config.trainer.context_parallel_size > 1 and config.trainer.train_backend == "torch":
        yield from _context_rules(config)
    if config.trainer.train_backend == "megatron":
        yield from _megatron_rules(config)


def _adapter_rules(config: RunConfig) -> Iterator[str]:
    """What can't be trained by low-rank adapters."""
    own = config.trainer
    if own.train_backend == "megatron":
        yield f"lora_rank: train_backend 'megatron' has no adapters; use {cure('lora_rank', '0')}"
    if own.tensor_model_parallel_size > 1:
        yield (
            "lora_rank: matrices with adapters are not split over tensor parallel ranks; use "
            f"{cure('tensor_model_parallel_size', '1')}, FSDP shards them all the same"
        )


def _context_rules(config: RunConfig) -> Iterator[str]:
    """What the torch backend can't do with parts of sequences."""
    size = cure("context_parallel_size", "1")
    if config.algorithm.routing_replay is not None:
        yield (
            f"{config.algorithm.routing_replay}: experts are replayed for whole sequences, which "
            f"context parallel ranks split; use {size}"
        )
    if config.data.multimodal_keys:
        yield f"multimodal_keys: sequences with images can't be split over ranks; use {size}"


def _megatron_rules(config: RunConfig) -> Iterator[str]:
    """What Megatron's trainer can't be asked."""
    backend = cure("train_backend", "torch")
    if config.runtime.mode == "local":
        yield (
            "train_backend 'megatron' trains in processes of its own: the engine of mode local "
            f"shares its weights with the trainer; add {cure('mode', 'disaggregated')}, or "
            "--colocate"
        )
    if config.has_critic:
        yield (
            f"advantage_estimator {config.algorithm.advantage_estimator!r} has a critic, which "
            f"train_backend 'megatron' has not; use {backend}"
        )
    if config.data.multimodal_keys:
        yield f"multimodal_keys: train_backend 'megatron' takes only text; use {backend}"


def placement_notes(config: RunConfig) -> Iterator[str]:
    """One line for all sizes of a cluster that a run in one process does not have, or for machines
    that a run without a cluster does not."""
    runtime = config.runtime
    if runtime.mode != "local":
        if runtime.actor_num_nodes > 1 and runtime.ray_address is None:
            yield (
                f"actor_num_nodes {runtime.actor_num_nodes}: this can be planned, but a run needs "
                f"a Ray cluster with those nodes: {cure('ray_address', 'HOST:PORT')}"
            )
        return
    idle = [
        leaf
        for section, leaves in _OF_CLUSTERS.items()
        for leaf in leaves
        if leaf in getattr(config, section).model_fields_set
    ]
    if idle:
        flags = ", ".join("--" + leaf.replace("_", "-") for leaf in idle)
        yield f"without effect in mode local, which trains in one process: {flags}"
