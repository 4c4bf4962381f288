"""The engines by name. Nothing heavy is imported here: a class is loaded when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine: the name for `--rollout-engine`, what it is, and where its class lives."""

    name: str
    doc: str
    path: str | None = None
    """`package.module:Class` of an engine in this process, implementing `types.ports.Engine` and
    `types.ports.EngineControl`; None: it is always a server."""
    launch: str | None = None
    """`package.module:function` of an engine in a process of its own: `engines.launch`'s
    LaunchSettings -> LaunchSpec."""
    client: str | None = None
    """`package.module:function` of the same: (url, ClientSettings) -> types.ports.RemoteEngine."""
    leaves: tuple[str, ...] = ()
    """Settings of the `engine` section that only this engine reads."""


ENGINES: tuple[EngineRow, ...] = (
    EngineRow(
        name="embedded",
        doc="Runs in this process on the trainer's own tensors: continuous batching, shared "
        "prompts, CPU or CUDA, any Hugging Face causal LM.",
        path="dovetail.engines.embedded.engine:EmbeddedEngine",
        launch="dovetail.engines.embedded.launch:launch",
        client="dovetail.engines.sglang.client:make_client",
        leaves=("engine_fused", "engine_cuda_graphs", "engine_kv_tokens"),
    ),
    EngineRow(
        name="vllm",
        doc="Servers of vLLM 0.32 or newer that the run starts or is told of.",
        launch="dovetail.engines.vllm.launch:launch",
        client="dovetail.engines.vllm.client:make_client",
    ),
    EngineRow(
        name="sglang",
        doc="Servers of SGLang 0.5.23 or newer that the run starts or is told of.",
        launch="dovetail.engines.sglang.launch:launch",
        client="dovetail.engines.sglang.client:make_client",
    ),
)


def engine_row(name: str) -> EngineRow:
    """The row of a name that the configuration allows."""
    return next(row for row in ENGINES if row.name == name)


def load(path: str | None) -> Any:
    """What a row's `package.module:name` says."""
    assert path is not None, "a row has what its kind of engine needs"
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
