"""The engines by name. Nothing heavy is imported here: a class is loaded when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine: the name for `--rollout-engine`, what it is, and where its class lives."""

    name: str
    doc: str
    path: str
    """`package.module:Class`, implementing `types.ports.Engine` and `types.ports.EngineControl`."""


ENGINES: tuple[EngineRow, ...] = (
    EngineRow(
        name="embedded",
        doc="Runs in this process on the trainer's own tensors: continuous batching, shared "
        "prompts, CPU or CUDA, any Hugging Face causal LM.",
        path="dovetail.engines.embedded.engine:EmbeddedEngine",
    ),
)
