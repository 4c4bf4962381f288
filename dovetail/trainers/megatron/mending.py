"""Where megatron-core 0.16 goes wrong without Transformer Engine and Apex, that is, when its
distributed optimizer runs torch's AdamW, on whatever device.

Loading a checkpoint of it (optimizer/distrib_optimizer.py): the values are copied into weights
outside of `no_grad`, the moments' `step` is looked for among tensors that have none, and one step
tensor is shared by all weights, so that AdamW counts it once for each. Saving one before the first
step asserts. Every object is mended by itself; the classes stay as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def mend(optimizer: Any) -> None:
    """Mend the parts of an optimizer that need it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and isinstance(inner, torch.optim.AdamW):
            part._set_main_param_and_optimizer_states = MethodType(_set_states, part)
            load = part.load_state_dict
            part.load_state_dict = MethodType(_loading(load), part)


@torch.no_grad()
def _set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
    group, place = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][place]
    for key, value in {"param": main, **self.optimizer.state[main]}.items():
        if key != "step":
            value.copy_(tensors[key])


def _loading(load: Any) -> Any:
    def load_state_dict(self: Any, state: Any) -> None:
        load(state)
        for own in self.optimizer.state.values():
            if "step" in own:
                own["step"] = own["step"].clone()

    return load_state_dict


@torch.no_grad()
def with_moments(optimizer: Any) -> None:
    """Give torch's AdamW the moments, zeros, that it otherwise makes in its first step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if not isinstance(inner, torch.optim.AdamW):
            continue
        weights = [weight for group in inner.param_groups for weight in group["params"]]
        for weight in (one for one in weights if not inner.state[one]):
            inner.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
