"""How the trainer's ranks share a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dovetail.config.sections.base import Section


class TrainerConfig(Section):
    """How the trainer's ranks share a model."""

    train_backend: Literal["torch", "megatron"] = Field(
        "torch",
        description=(
            "torch: any Hugging Face causal LM, sharded by FSDP2 over several ranks; megatron: "
            "megatron-core's GPTModel."
        ),
    )
    dp_replicate_size: int = Field(
        1,
        ge=1,
        description="Copies of the sharded weights: ranks of one copy shard, copies sum (torch).",
    )
    tensor_model_parallel_size: int = Field(
        1, ge=1, description="Ranks that split each layer's matrices."
    )
    sequence_parallel: bool = Field(
        False, description="Split norms over the tensor-parallel ranks too, along the sequence."
    )
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="Ranks that split the layers into stages (megatron)."
    )
    num_layers_per_virtual_pipeline_stage: int | None = Field(
        None,
        ge=1,
        description="Layers of an interleaved stage; default: no interleaving (megatron).",
    )
    context_parallel_size: int = Field(1, ge=1, description="Ranks that split each sequence.")
    expert_model_parallel_size: int = Field(
        1, ge=1, description="Ranks that split the experts of a layer (megatron)."
    )
    expert_tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        description=(
            "Ranks that split each expert's matrices (megatron); default: as "
            "tensor_model_parallel_size."
        ),
    )
    use_distributed_optimizer: bool = Field(
        True, description="Split optimizer states over the data-parallel ranks (megatron)."
    )
    fsdp_cpu_offload: bool = Field(
        False, description="Keep shards, gradients and optimizer in CPU memory (torch, sharded)."
    )
    distributed_backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="What ranks talk through; auto: nccl on GPUs, gloo elsewhere."
    )
    distributed_timeout_minutes: float = Field(
        10.0, gt=0, description="Longest wait of a rank for the others in one collective."
    )
    lora_rank: int = Field(
        0, ge=0, description="Rank of low-rank adapters, trained instead of the weights; 0: none."
    )
    lora_alpha: float = Field(
        32.0, gt=0, description="Adapters count lora_alpha / lora_rank times."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of an adapter's inputs that training leaves out."
    )
    target_modules: list[str] = Field(
        default_factory=lambda: ["all-linear"],
        description="Modules with adapters, by the ends of their names; all-linear: every one.",
    )

    @field_validator("train_backend", mode="before")
    @classmethod
    def _named_by_its_sharding(cls, value: object) -> object:
        """miles and cosmos-rl say fsdp."""
        return "torch" if value == "fsdp" else value

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one whole model between them, apart from FSDP shards: tensor, pipeline
        and context parallel."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
