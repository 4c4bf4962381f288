"""How many engines a run starts."""

from __future__ import annotations

from dovetail.config.eval_sets import eval_sets
from dovetail.config.run import RunConfig


def num_engines(config: RunConfig) -> int:
    """Engines that the run starts: as `rollout_num_gpus` says, else `rollout_num_engines`, else,
    colocated, as many as fit on the trainer's devices."""
    own, runtime = config.engine, config.runtime
    if own.external_urls or config.train_only or (config.is_sft and not eval_sets(config)):
        return 0
    per_engine = runtime.rollout_num_gpus_per_engine
    if runtime.mode != "local" and runtime.rollout_num_gpus is not None:
        return runtime.rollout_num_gpus // per_engine
    if runtime.mode == "colocated" and "rollout_num_engines" not in own.model_fields_set:
        return max(1, runtime.trainer_ranks // per_engine)
    return own.rollout_num_engines
