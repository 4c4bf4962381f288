"""Megatron's optimizer with our settings: the steps are those of
`dovetail.trainers.torch.optim.MasterAdamW`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dovetail.config.sections import OptimizerConfig
from dovetail.trainers.megatron.passed import Target, settings_of
from dovetail.trainers.torch.optim import StepResult, decay_steps, learning_rate


class Schedule(OptimizerParamScheduler):
    """Megatron's scheduler with the rates of `learning_rate`, so that both backends make the same
    steps."""

    def __init__(self, optimizer: Any, config: OptimizerConfig, total_steps: int | None):
        self.own, self.last_step = config, decay_steps(config, total_steps)
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=min(config.min_lr, config.lr),
            lr_warmup_steps=0,
            lr_decay_steps=self.last_step or 1,
            lr_decay_style="constant",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Of the next step."""
        return learning_rate(self.num_steps, self.own, self.last_step)


class Optimizer:
    """Gathered gradients in, changed weights out."""

    def __init__(
        self,
        chunks: Sequence[Any],
        config: OptimizerConfig,
        total_steps: int | None,
        dtype: torch.dtype,
        passed: Mapping[str, Any],
    ):
        self.chunks = list(chunks)
        own = {
            "optimizer": "adam",
            "lr": config.lr,
            "min_lr": config.min_lr,
            "weight_decay": config.weight_decay,
            "adam_beta1": config.adam_beta1,
            "adam_beta2": config.adam_beta2,
            "adam_eps": config.adam_eps,
            "clip_grad": config.clip_grad,
            "bf16": dtype is torch.bfloat16,
            "params_dtype": dtype,
            "use_distributed_optimizer": chunks[0].ddp_config.use_distributed_optimizer,
            **settings_of(passed, Target.OPTIMIZER),
        }
        self.config = MegatronOptimizerConfig(**own)
        self.optimizer: Any = get_megatron_optimizer(
            self.config, self.chunks, use_gloo_process_groups=False
        )
        self.schedule = Schedule(self.optimizer, config, total_steps)
        self.drop_grads()

    @property
    def parts(self) -> list[Any]:
        """Of expert and of other weights, where they are apart."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    @property
    def steps_done(self) -> int:
        return int(self.schedule.num_steps)

    def drop_grads(self) -> None:
        """Forget all gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip, update and advance the schedule; on a non-finite gradient do nothing at all.

        Gradients are dropped either way.
        """
        lr = self.schedule.get_lr({})
        found_inf = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        applied = math.isfinite(norm) and not found_inf
        if applied:
            self._clip(norm)
            self.optimizer.step_with_ready_grads()
            self.schedule.step(1)
        self.drop_grads()
        return StepResult(norm, lr, applied)

    def _clip(self, norm: float) -> None:
        for part in self.parts:
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters and 0 < self.config.clip_grad < norm:
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=self.config.clip_grad,
                    total_norm=norm,
                    use_decoupled_grad=self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )

    def go_to(self, steps: int) -> None:
        """The schedule's place, and that of the moments' correction."""
        self.schedule.num_steps = 0
        self.schedule.step(steps)
        self.drop_grads()

    def tensors(self) -> list[torch.Tensor]:
        """Masters and moments."""
        found = []
        for part in self.parts:
            inner = part.optimizer
            for group in inner.param_groups:
                found += group["params"]
            for state in inner.state.values():
                found += [one for one in state.values() if isinstance(one, torch.Tensor)]
        return found

    def gradients(self) -> list[torch.Tensor]:
        """The buffers in which they add up."""
        return [
            buffer.grad_data
            for chunk in self.chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
