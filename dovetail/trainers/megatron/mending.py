"""An optimizer's masters and moments, whole and by weight, whatever holds them.

megatron-core 0.16 saves its distributed optimizer wrongly in several ways (optimizer/
distrib_optimizer.py). In the form that may change layout, buffers are cut at places of their padded
form, so that with tied embeddings the tail of a buffer is lost and the rest is out of place; with
torch's AdamW, that is without Transformer Engine and Apex, saving before the first step asserts,
loading copies outside of `no_grad`, and all weights get one step tensor, which AdamW counts once
for each. So a checkpoint of ours asks the optimizer for none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank's optimizer holds of one weight of the model."""

    weight: torch.Tensor
    main: torch.Tensor | None
    """The float32 master, or this rank's piece of it; None: it has none."""
    place: slice
    """Of the piece in the flattened weight."""
    inner: Any
    """torch's optimizer."""
    group: dist.ProcessGroup | None
    """Ranks that have the other pieces."""

    def whole(self, key: str) -> torch.Tensor:
        """One of `KEYS`, shaped as the weight, float32. All ranks of `group` call it."""
        found = torch.zeros(self.weight.numel(), device=self.weight.device)
        if self.main is not None:
            found[self.place] = self._own(self.main, key).detach().flatten().float()
        if self.group is not None:
            dist.all_reduce(found, group=self.group)
        return found.view(self.weight.shape)

    def blank(self) -> torch.Tensor:
        """As `whole`, for values to come."""
        return torch.zeros(self.weight.shape, device=self.weight.device)

    @torch.no_grad()
    def put(self, key: str, whole: torch.Tensor) -> None:
        """Take this rank's piece over."""
        if self.main is not None:
            piece = whole.flatten()[self.place].view(self.main.shape)
            self._own(self.main, key).copy_(piece)

    def _own(self, main: torch.Tensor, key: str) -> torch.Tensor:
        if key == "param":
            return main
        state = self.inner.state[main]
        if key not in state:
            # They are made in the first step otherwise.
            state[key] = torch.zeros_like(main, dtype=torch.float32)
        found: torch.Tensor = state[key]
        return found


def held(optimizer: Any) -> Iterator[Held]:
    """Every weight of Megatron's optimizer, in one order on all ranks, also those of which this
    rank has no piece."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        if isinstance(part, DistributedOptimizer):
            for weight in (one for buffer in part.buffers for one in buffer.param_index_map):
                yield _piece(part, weight)
            continue
        for weight, main in _pairs(part):
            yield Held(weight, main, slice(0, weight.numel()), part.optimizer, None)


def _piece(part: Any, weight: torch.Tensor) -> Held:
    if weight not in part.model_param_group_index_map:
        return Held(weight, None, slice(0, 0), part.optimizer, part.data_parallel_group)
    group, number = part.model_param_group_index_map[weight]
    own = part._get_model_param_range_map(weight)["param"]
    main = part.optimizer.param_groups[group]["params"][number]
    place = slice(own.start, own.end)
    return Held(weight, main, place, part.optimizer, part.data_parallel_group)


def set_steps(optimizer: Any, steps: int) -> None:
    """How many steps the moments have seen."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.AdamW):
            for state in inner.state.values():
                state["step"] = torch.tensor(float(steps))
        elif inner is not None:
            for group in inner.param_groups:
                group["step"] = steps


def _pairs(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for weights, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(weights, mains, strict=True)
        own = [one for group in part.fp32_from_fp32_groups for one in group]
    else:
        own = [one for group in part.optimizer.param_groups for one in group["params"]]
    yield from zip(own, own, strict=True)
