"""A run's plan as text, with nothing loaded and nothing started: `dovetail config show --plan` and
`dovetail train --dry-run`."""

from __future__ import annotations

from pathlib import Path

from dovetail.checkpoint import hf
from dovetail.config.run import RunConfig
from dovetail.runtime.machine import cluster_of
from dovetail.runtime.parameters import count_parameters
from dovetail.runtime.plan import plan
from dovetail.runtime.roles import table
from dovetail.runtime.shape import ModelShape, shape_of


def planned(config: RunConfig) -> str:
    """Who gets which devices, and the memory that each role is expected to need.

    Args:
        config: one that passed `dovetail.run.validate.validate`.

    Raises:
        ConfigError: the plan can't be, or its cluster can't be reached.
    """
    cluster = cluster_of(config)
    made = plan(config, cluster, shape_of(config))
    path = str(config.model.hf_checkpoint)
    if not Path(path).is_dir():
        return f"{made.describe()}\n{path} is no directory here: nothing to count\n"
    trusted = config.model.trust_remote_code
    skeleton = hf.load_skeleton(path, config.model.dtype, trusted, needs_weights=False)
    own = config.trainer
    count = count_parameters(skeleton, own.lora_rank, own.target_modules)
    shape = ModelShape.read(path) or ModelShape()
    return table(config, made, cluster, shape, count)
