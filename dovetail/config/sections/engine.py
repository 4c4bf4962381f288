"""What makes the tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class EngineConfig(Section):
    """What makes the tokens."""

    rollout_engine: str = Field(
        "embedded",
        description=("Engine by name; embedded runs in this process on the trainer's own tensors."),
    )
    engine_max_running: int = Field(
        0,
        ge=0,
        description="Most sequences decoded at once; 0: as many as a step needs, up to 256.",
    )
    engine_kv_tokens: int = Field(
        0, ge=0, description="Tokens that the KV cache holds; 0: from engine_memory_gb."
    )
    engine_memory_gb: float = Field(
        2.0, gt=0, description="Memory for the KV cache when engine_kv_tokens is 0."
    )
    engine_fused: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "Fused decoding for Llama/Qwen models after a check against the module's "
            "logits; on fails where auto falls back."
        ),
    )
    engine_cuda_graphs: bool = Field(
        True, description="Capture decode steps as CUDA graphs where a GPU is present."
    )
