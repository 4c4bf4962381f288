"""What this machine, or the cluster of a run, has, as far as a plan asks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dovetail.config.run import RunConfig
from dovetail.runtime.plan import Cluster


def cluster_of(config: RunConfig) -> Cluster:
    """What the run can be placed on: the Ray cluster that it names, else this machine.

    Raises:
        ConfigError: the cluster can't be reached.
        MissingExtraError: Ray is not installed.
    """
    address = config.runtime.ray_address
    if config.runtime.mode == "local" or address is None:
        return cluster_here(config)
    from dovetail.runtime.ray.cluster import Cluster as OnRay

    reached = OnRay(address, {})
    reached.start()
    try:
        return found(config, reached.in_order, _gpu_memory())
    finally:
        reached.close()


def found(config: RunConfig, nodes: Sequence[Mapping[str, Any]], gpu_memory: int | None) -> Cluster:
    """What a plan asks of a Ray cluster.

    Args:
        nodes: those that live, as `ray.nodes()` tells of them, in the order of the plan.
        gpu_memory: bytes of a GPU of this machine: Ray does not know what those of others have.
    """
    gpus = tuple(int(node["Resources"].get("GPU", 0)) for node in nodes)
    has_gpus = any(gpus)
    if has_gpus and config.model.device != "cpu":
        return Cluster(True, gpus, memory_bytes=gpu_memory)
    memory = [int(node["Resources"].get("memory", 0)) for node in nodes]
    least = min((one for one in memory if one), default=None)
    return Cluster(has_gpus, num_nodes=len(nodes), memory_bytes=least)


def cluster_here(config: RunConfig) -> Cluster:
    """This machine alone; without GPUs as many nodes and devices as are asked for."""
    memory = _gpu_memory()
    if memory is None or config.model.device == "cpu":
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Cluster(memory is not None, memory_bytes=machine)
    return Cluster(True, (torch.cuda.device_count(),), memory_bytes=memory)


def _gpu_memory() -> int | None:
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
