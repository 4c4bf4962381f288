"""A layer's matrices split over tensor parallel ranks, as the model's plan in transformers says.

Columns and rows of attention and of dense MLPs are split (DTensor). What a plan splits in another
way (fused projections, experts), embeddings and the head stay whole on every tensor parallel rank;
FSDP shards them over the others.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from dovetail.types.errors import ConfigError

_COLUMNS, _ROWS, _SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"


def split_layer(model: Any, prefix: str, layer: torch.nn.Module, mesh: DeviceMesh) -> list[str]:
    """Split `layer`, whose name in `model` is `prefix`, in place.

    Returns:
        Names, in the model, of the whole parameters whose gradients are partial: each rank has that
        of its own heads, to be added up over the ranks.
    """
    styles: dict[str, ParallelStyle] = {}
    partial: list[str] = []
    for parent, module in layer.named_modules():
        plan = _plan_of(model, f"{prefix}.{parent}" if parent else prefix, module)
        if not _splits(plan, module):
            continue
        for name, style in plan.items():
            own = f"{parent}.{name}" if parent else name
            if style == _SUMMED:
                partial += [
                    f"{prefix}.{own}.{p}" for p, _ in getattr(module, name).named_parameters()
                ]
            else:
                styles[own] = ColwiseParallel() if style == _COLUMNS else RowwiseParallel()
    if styles:
        parallelize_module(layer, mesh, styles, src_data_rank=None)
    return partial


def check_splits(model: Any, size: int) -> None:
    """Refuse sizes that do not divide what is split.

    Raises:
        ConfigError: heads do not divide, or the model has no plan.
    """
    config = model.config.get_text_config()
    if not getattr(model, "tp_plan", None):
        raise ConfigError(
            f"{type(model).__name__} has no plan for tensor parallel ranks in transformers; use "
            "--tensor-model-parallel-size 1 (TOML: trainer.tensor_model_parallel_size)"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, name, None)
        if count and count % size:
            raise ConfigError(
                f"the model's {name}, {count}, can't be split over {size} tensor parallel ranks; "
                "use a --tensor-model-parallel-size (TOML: trainer.tensor_model_parallel_size) "
                "that divides it"
            )


def _plan_of(model: Any, path: str, module: torch.nn.Module) -> dict[str, str]:
    """Style of each planned child of the module at `path`."""
    found = {}
    for name, _ in module.named_children():
        for pattern, style in model.tp_plan.items():
            if fnmatch.fnmatchcase(f"{path}.{name}", pattern):
                found[name] = style
    return found


def _splits(plan: dict[str, str], module: torch.nn.Module) -> bool:
    """Whether this module's projections come as columns, then rows, each a plain matrix."""
    styles = set(plan.values())
    matrices = [name for name, style in plan.items() if style in (_COLUMNS, _ROWS)]
    plain = all(isinstance(getattr(module, name), torch.nn.Linear) for name in matrices)
    return plain and {_COLUMNS, _ROWS} <= styles <= {_COLUMNS, _ROWS, _SUMMED}
