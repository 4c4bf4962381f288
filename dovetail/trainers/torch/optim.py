"""AdamW on float32 master weights, its schedule, and the gradients it takes.

bfloat16 weights have a float32 master each, and their gradients are added up in float32; float32
weights are their own masters. Updated weights are written into the model's tensors in place,
because the engine reads the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dovetail.config.sections import OptimizerConfig
from dovetail.trainers.torch.placement import Placed, placed
from dovetail.types.errors import CheckpointError, ConfigError


def learning_rate(step: int, config: OptimizerConfig, decay_steps: int | None) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up to `lr`, then constant, linear or
    cosine to `min_lr` at step `decay_steps`, and constant after it."""
    if step < config.lr_warmup_iters:
        return config.lr * (step + 1) / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return config.lr
    assert decay_steps is not None
    span = max(decay_steps - config.lr_warmup_iters, 1)
    done = min((step - config.lr_warmup_iters) / span, 1.0)
    left = 1 - done if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


def decay_steps(config: OptimizerConfig, total_steps: int | None) -> int | None:
    """Steps until `min_lr`.

    Raises:
        ConfigError: a decaying schedule without an end.
    """
    steps = config.lr_decay_iters or total_steps
    if config.lr_decay_style != "constant" and steps is None:
        raise ConfigError(
            f"lr_decay_style is {config.lr_decay_style!r} but the run has no known number of "
            "steps; set --lr-decay-iters (TOML: optimizer.lr_decay_iters) or --num-rollout "
            "(TOML: data.num_rollout)"
        )
    return steps


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    lr: float
    applied: bool
    """False: the gradient was not finite, and nothing changed."""


class MasterAdamW:
    """Gradients in, changed weights out."""

    def __init__(
        self,
        model: torch.nn.Module | Placed,
        config: OptimizerConfig,
        total_steps: int | None,
    ):
        self.config, self.placed = config, placed(model)
        self.decay_steps = decay_steps(config, total_steps)
        named = self.placed.model.named_parameters()
        self.params = {name: p for name, p in named if p.requires_grad}
        self.masters = {
            name: self.placed.local(p) if p.dtype == torch.float32 else p.detach().float()
            for name, p in self.params.items()
        }
        """This rank's part of each weight, in float32; of float32 weights it is their memory."""
        self._copies = {name for name, p in self.params.items() if p.dtype != torch.float32}
        self.main_grads: dict[str, torch.Tensor] = {}
        self._names = {id(p): name for name, p in self.params.items()}
        self.steps_done = 0
        vectors = [m for m in self.masters.values() if m.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": [m for m in self.masters.values() if m.ndim >= 2]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def grad_for(self, param: torch.nn.Parameter | None) -> torch.Tensor | None:
        """The float32 tensor that adds up this weight's gradient; None if it is not trained."""
        name = self._names.get(id(param))
        if name is None:
            return None
        if name not in self.main_grads:
            self.main_grads[name] = torch.zeros_like(self.masters[name], requires_grad=False)
            if name not in self._copies:
                # Autograd then adds into the same tensor.
                self.params[name].grad = self.main_grads[name]
        return self.main_grads[name]

    def collect(self) -> None:
        """Take over what a backward pass left in `param.grad`."""
        for name, param in self.params.items():
            if param.grad is None:
                continue
            if name not in self._copies:
                self.main_grads[name] = self.placed.local(param.grad)
                continue
            if name in self.main_grads:
                self.main_grads[name].add_(param.grad)
            else:
                self.main_grads[name] = param.grad.float()
            param.grad = None

    def drop_grads(self) -> None:
        """Forget all gradients and free their memory."""
        self.main_grads.clear()
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip, update, write back and advance the schedule; on a non-finite gradient do nothing at
        all.

        Gradients are dropped either way.
        """
        lr = learning_rate(self.steps_done, self.config, self.decay_steps)
        grads = self._all_grads()
        self.placed.add_up(grads)
        norm = self.placed.norm(grads)
        if not math.isfinite(norm):
            self.drop_grads()
            return StepResult(norm, lr, applied=False)
        if 0 < self.config.clip_grad < norm:
            torch._foreach_mul_(list(grads.values()), self.config.clip_grad / norm)
        for name, master in self.masters.items():
            master.grad = grads[name]
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for master in self.masters.values():
            master.grad = None
        self.drop_grads()
        self.write_back()
        self.steps_done += 1
        return StepResult(norm, lr, applied=True)

    def _all_grads(self) -> dict[str, torch.Tensor]:
        """Those of weights that no micro-batch touched are 0."""
        if not self.placed.shards:
            for param in self.params.values():
                self.grad_for(param)
        return {
            name: self.main_grads[name] if name in self.main_grads else torch.zeros_like(master)
            for name, master in self.masters.items()
        }

    @torch.no_grad()
    def write_back(self) -> None:
        """Round masters into the model's own tensors, in place."""
        for name in self._copies:
            self.params[name].copy_(self.masters[name])

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Masters and moments by weight name (no copies), and the schedule's position."""
        tensors = {f"master.{name}": m.detach() for name, m in self.masters.items()}
        for name, master in self.masters.items():
            state = self.adam.state.get(master, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    tensors[f"{key}.{name}"] = state[key]
        return tensors, {"steps_done": self.steps_done}

    def kept(self) -> Iterator[torch.Tensor]:
        """All that lasts between steps, beside the model's own tensors."""
        yield from self.masters.values()
        for state in self.adam.state.values():
            yield from state.values()

    def shards(self) -> dict[str, torch.Tensor]:
        """Masters and moments as parts of what all ranks hold; no copies."""
        named = {}
        for key, tensor in self.state_dict()[0].items():
            kind, _, name = key.partition(".")
            named[f"{kind}.{name}"] = self.placed.storable(name, tensor)
        return named

    def room_for(self, steps_done: int) -> dict[str, torch.Tensor]:
        """The shards that a state after so many steps is read into; `taken` ends the reading."""
        self.adam.state.clear()
        if steps_done:
            for master in self.masters.values():
                self.adam.state[master] = {
                    "step": torch.tensor(float(steps_done), device=master.device),
                    "exp_avg": torch.zeros_like(master, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
                }
        self.steps_done = steps_done
        return self.shards()

    def taken(self) -> None:
        """What `room_for` gave is filled: go on from it."""
        self.drop_grads()
        self.write_back()

    @torch.no_grad()
    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Copy a state in place: following steps are those of the trainer that it was taken from.

        Raises:
            CheckpointError: weights are missing, or their shapes differ.
        """
        steps = int(facts["steps_done"])
        keys = ("master", "exp_avg", "exp_avg_sq") if steps else ("master",)
        for name, master in self.masters.items():
            for key in keys:
                _check(tensors, f"{key}.{name}", master)
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            self.adam.state.pop(master, None)
            if steps:
                moments = {
                    key: torch.empty_like(master, requires_grad=False).copy_(
                        tensors[f"{key}.{name}"]
                    )
                    for key in keys[1:]
                }
                step = torch.tensor(float(steps), device=master.device)
                self.adam.state[master] = {"step": step, **moments}
        self.drop_grads()
        self.steps_done = steps
        self.write_back()


def _check(tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> None:
    if name not in tensors:
        raise CheckpointError(
            f"trainer state has no {name}; it belongs to another model or is damaged"
        )
    if tensors[name].shape != like.shape:
        raise CheckpointError(
            f"trainer state: {name} has shape {list(tensors[name].shape)}, the model's is "
            f"{list(like.shape)}; --hf-checkpoint (TOML: model.hf_checkpoint) must be the "
            "run's model"
        )
