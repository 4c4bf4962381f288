"""`utils.eval_config`: evaluation sets."""

from dovetail.hooks.eval_datasets import (
    EvalDatasetConfig,
    build_eval_dataset_configs,
    ensure_dataset_list,
    pick_from_args,
)

__all__ = [
    "EvalDatasetConfig",
    "build_eval_dataset_configs",
    "ensure_dataset_list",
    "pick_from_args",
]
