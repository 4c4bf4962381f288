"""Sizes of a cluster that can't be split as asked, told with their numbers. As in
`dovetail.config.check`, whose rules these are.

What needs the model's own sizes (heads, layers, experts) is in `dovetail.runtime.fit`, what needs
the machines in `dovetail.runtime.plan`.
"""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig

_OF_MEGATRON = {
    "pipeline_model_parallel_size": 1,
    "num_layers_per_virtual_pipeline_stage": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}
"""What only megatron-core splits, and the value that asks for nothing."""
_OF_TORCH = {"dp_replicate_size": 1, "fsdp_cpu_offload": False}
_OF_A_REPLICA = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def size_rules(config: RunConfig) -> Iterator[str]:
    """Splits of trainer and engines that do not come out even, or that the backend does not
    have."""
    if config.runtime.mode == "local":
        return
    if config.debug.debug_rollout_only:
        yield (
            f"debug_rollout_only trains nothing, and mode '{config.runtime.mode}' is about where "
            f"the trainer's ranks are; {cure('mode', 'local')}"
        )
    yield from _of_the_other_backend(config)
    yield from _ranks(config)
    yield from _engines(config)


def _of_the_other_backend(config: RunConfig) -> Iterator[str]:
    own = config.trainer
    foreign, other = (
        (_OF_MEGATRON, "megatron") if own.train_backend == "torch" else (_OF_TORCH, "torch")
    )
    for leaf, nothing in foreign.items():
        value = getattr(own, leaf)
        if value != nothing:
            yield (
                f"{leaf} {value} is what train_backend '{other}' does, not '{own.train_backend}'; "
                f"leave {cure(leaf)} out, or use {cure('train_backend', other)}"
            )


def _ranks(config: RunConfig) -> Iterator[str]:
    own, runtime = config.trainer, config.runtime
    world, replica = runtime.trainer_ranks, own.ranks_per_replica
    ranks = (
        f"{world} trainer ranks (actor_num_nodes {runtime.actor_num_nodes} x "
        f"actor_num_gpus_per_node {runtime.actor_num_gpus_per_node})"
    )
    tp, pp = own.tensor_model_parallel_size, own.pipeline_model_parallel_size
    if world % replica:
        largest = max(_OF_A_REPLICA, key=lambda leaf: int(getattr(own, leaf)))
        yield (
            f"{ranks} can't be split into groups of {replica}: tensor {tp} x pipeline {pp} x "
            f"context {own.context_parallel_size}; have a multiple of {replica} ranks: "
            f"{cure('actor_num_gpus_per_node')}, or lower {cure(largest)}"
        )
    elif (world // replica) % own.dp_replicate_size:
        yield (
            f"dp_replicate_size {own.dp_replicate_size} does not divide the {world // replica} "
            f"data-parallel ranks ({world} ranks / {replica}); {cure('dp_replicate_size', 1)}"
        )
    experts = pp * own.expert_model_parallel_size * (own.expert_tensor_parallel_size or tp)
    if own.train_backend == "megatron" and world % experts:
        yield (
            f"{ranks} can't be split into groups of {experts} for the experts: pipeline {pp} x "
            f"expert {own.expert_model_parallel_size} x expert tensor "
            f"{own.expert_tensor_parallel_size or tp}; lower {cure('expert_model_parallel_size')} "
            f"or set {cure('expert_tensor_parallel_size', 1)}"
        )
    if own.sequence_parallel and tp == 1:
        yield (
            "sequence_parallel splits over the tensor-parallel ranks, and "
            f"tensor_model_parallel_size is 1; {cure('sequence_parallel', False)} or "
            f"{cure('tensor_model_parallel_size', 2)}"
        )
    if own.num_layers_per_virtual_pipeline_stage is not None and pp == 1:
        yield (
            "num_layers_per_virtual_pipeline_stage interleaves pipeline stages, and "
            "pipeline_model_parallel_size is 1; leave "
            f"{cure('num_layers_per_virtual_pipeline_stage')} out"
        )
    if runtime.num_gpus_per_node is not None and (
        runtime.actor_num_gpus_per_node > runtime.num_gpus_per_node
    ):
        yield (
            f"actor_num_gpus_per_node {runtime.actor_num_gpus_per_node} is above num_gpus_per_node "
            f"{runtime.num_gpus_per_node}; lower {cure('actor_num_gpus_per_node')} and raise "
            f"{cure('actor_num_nodes')}"
        )


def _engines(config: RunConfig) -> Iterator[str]:
    own, runtime = config.engine, config.runtime
    per_engine, total = runtime.rollout_num_gpus_per_engine, runtime.rollout_num_gpus
    if own.rollout_external_engine_addrs:
        if runtime.mode == "colocated":
            yield (
                "rollout_external_engine_addrs names engines that run already, and colocated ones "
                f"are started on the trainer's devices; {cure('mode', 'disaggregated')}"
            )
        return
    if own.rollout_engine == "embedded" and per_engine > 1:
        yield (
            f"rollout_num_gpus_per_engine {per_engine}: the embedded engine has one device; "
            f"{cure('rollout_num_gpus_per_engine', 1)}, or {cure('rollout_engine', 'vllm')}"
        )
    node = runtime.num_gpus_per_node
    if runtime.mode == "colocated":
        node = runtime.actor_num_gpus_per_node
    if node is not None and per_engine > node:
        yield (
            f"rollout_num_gpus_per_engine {per_engine} is above the {node} devices of a node, and "
            f"an engine stays on one; lower {cure('rollout_num_gpus_per_engine')}"
        )
    if total is not None and total % per_engine:
        yield (
            f"rollout_num_gpus {total} is no multiple of rollout_num_gpus_per_engine {per_engine}; "
            f"{cure('rollout_num_gpus', max(1, total // per_engine) * per_engine)}"
        )
    elif (
        total is not None
        and "rollout_num_engines" in own.model_fields_set
        and total != own.rollout_num_engines * per_engine
    ):
        yield (
            f"rollout_num_gpus {total} / rollout_num_gpus_per_engine {per_engine} gives "
            f"{total // per_engine} engines, and rollout_num_engines says "
            f"{own.rollout_num_engines}; leave {cure('rollout_num_engines')} out"
        )
    yield from _colocated_engines(config)


def _colocated_engines(config: RunConfig) -> Iterator[str]:
    runtime, own = config.runtime, config.engine
    if runtime.mode != "colocated":
        return
    asked, leaf = runtime.rollout_num_gpus, "rollout_num_gpus"
    if asked is None and "rollout_num_engines" in own.model_fields_set:
        asked = own.rollout_num_engines * runtime.rollout_num_gpus_per_engine
        leaf = "rollout_num_engines"
    if asked is not None and asked > runtime.trainer_ranks:
        yield (
            f"colocated engines are to have {asked} devices, and the trainer, whose devices they "
            f"share, has {runtime.trainer_ranks}; lower {cure(leaf)} or use "
            f"{cure('mode', 'disaggregated')}"
        )
