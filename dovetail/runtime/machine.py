"""What this machine has, as far as a plan asks."""

from __future__ import annotations

import os

import torch

from dovetail.config.run import RunConfig
from dovetail.runtime.plan import Cluster


def cluster_here(config: RunConfig) -> Cluster:
    """This machine alone, or, where a Ray cluster is named or there are no GPUs, as many nodes and
    devices as are asked for."""
    has_cuda = torch.cuda.is_available()
    if not has_cuda or config.model.device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Cluster(has_cuda, memory_bytes=memory)
    memory = torch.cuda.get_device_properties(0).total_memory
    here = None if config.runtime.ray_address else (torch.cuda.device_count(),)
    return Cluster(has_cuda, here, memory)
