"""AdamW and its schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, ge=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a decaying schedule.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape after warm-up."
    )
    lr_warmup_iters: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    lr_decay_iters: int | None = Field(
        None, ge=1, description="Optimizer steps until min_lr; default: the whole run."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta 2.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    clip_grad: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    max_nonfinite_steps: int = Field(
        10, ge=1, description="Steps in a row with non-finite gradients that stop the run."
    )
