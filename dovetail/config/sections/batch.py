"""How a step's samples become optimizer steps and micro-batches."""

from __future__ import annotations

from pydantic import Field

from dovetail.config.sections.base import Section


class BatchConfig(Section):
    """How a step's samples become optimizer steps and micro-batches."""

    global_batch_size: int | None = Field(None, ge=1, description="Samples per optimizer step.")
    num_steps_per_rollout: int | None = Field(
        None, ge=1, description="Optimizer steps per rollout; gives global_batch_size."
    )
    max_tokens_per_gpu: int = Field(
        16384, ge=1, description="Token budget of a micro-batch, padding included."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most samples of a micro-batch; default: only the token budget counts.",
    )
