"""Which model, in which precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class ModelConfig(Section):
    """Which model, in which precision."""

    hf_checkpoint: str | None = Field(
        None, description="Hugging Face model directory: weights, tokenizer, config."
    )
    ref_load: str | None = Field(
        None,
        description=(
            "Hugging Face directory of the frozen reference for KL; default: hf_checkpoint."
        ),
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Type of the weights in forward passes; master weights are always float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where model and engine live; auto takes a GPU when there is one."
    )
    num_threads: int = Field(
        0, ge=0, description="CPU threads for tensor work; 0 takes all that this process may use."
    )
    seed: int = Field(1234, ge=0, description="Seed of everything in training that is random.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
