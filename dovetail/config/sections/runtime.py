"""Who lives where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class RuntimeConfig(Section):
    """Who lives where. What counts as a GPU here is a CPU process on a machine without GPUs."""

    mode: Literal["local", "colocated", "disaggregated"] = Field(
        "local",
        description=(
            "local: one trainer in the run's own process; colocated: trainer ranks and engines on "
            "Ray take turns on the same GPUs; disaggregated: each has its own."
        ),
    )
    ray_address: str | None = Field(
        None,
        description=(
            "A Ray cluster that runs already (HOST:PORT or auto); default: one is started on this "
            "machine, and ended with the run."
        ),
    )
    actor_num_nodes: int = Field(1, ge=1, description="Nodes with trainer ranks.")
    actor_num_gpus_per_node: int = Field(
        1, ge=1, description="Trainer ranks of each node, one GPU each."
    )
    num_gpus_per_node: int | None = Field(
        None, ge=1, description="GPUs of a node; default: what each node has."
    )
    rollout_num_gpus: int | None = Field(
        None,
        ge=1,
        description=(
            "GPUs of all engines (disaggregated); default: rollout_num_engines times "
            "rollout_num_gpus_per_engine. Alone it gives the number of engines."
        ),
    )
    rollout_num_gpus_per_engine: int = Field(
        1, ge=1, description="GPUs of one engine, tensor parallel."
    )
    offload_train: bool | None = Field(
        None,
        description="Move the trainer off the GPUs while engines generate; default: colocated.",
    )
    offload_rollout: bool | None = Field(
        None, description="Have engines sleep while the trainer trains; default: colocated."
    )
    max_trainer_restarts: int = Field(
        3,
        ge=0,
        description=(
            "Times that lost trainer ranks are started anew, from the last checkpoint, before the "
            "run ends."
        ),
    )

    @property
    def trainer_rests(self) -> bool:
        """`offload_train`, or what the mode asks for."""
        return self.mode == "colocated" if self.offload_train is None else self.offload_train

    @property
    def engines_rest(self) -> bool:
        """`offload_rollout`, or what the mode asks for."""
        return self.mode == "colocated" if self.offload_rollout is None else self.offload_rollout

    @property
    def trainer_ranks(self) -> int:
        """Processes of the trainer."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node
