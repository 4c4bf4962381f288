"""What a run tells the row of an engine that is a server: how to start it, and how to speak to
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.types.ports import Tokenizer


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """What a run knows of every engine that it starts."""

    model_dir: Path
    """Hugging Face directory: architecture, tokenizer, the weights of version 0."""
    port: int
    max_context_len: int
    """Most tokens of prompt plus response."""
    python: str
    """The interpreter that has the engine installed."""
    host: str = "127.0.0.1"
    token: str | None = field(default=None, repr=False)
    """That clients are to send, where other machines reach `host`: in no flag, for everybody reads
    those in lists of processes and in logs."""
    device: str = "cpu"
    dtype: str = "bfloat16"
    """Of the trainer's weights: `float32`, `bfloat16` or `float16`."""
    temperature: float = 1.0
    """Of the rollouts that are trained on."""
    max_running: int = 0
    """Most sequences decoded at once; 0: the engine's own choice."""
    num_threads: int = 0
    """On a CPU, where the engine does not find out itself; 0: as many as there are."""
    memory_gb: float = 2.0
    """For keys and values, where the engine does not find out itself (CPU)."""
    seed: int = 0
    return_routed_experts: bool = False
    sleeps: bool = False
    """Whether the run takes its memory back between rollouts."""
    trust_remote_code: bool = False
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    """The run's settings of this engine's own, without prefix: `{"max_num_seqs": "64"}`. Of flags
    they are text, of TOML files typed."""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """How to start one engine."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict, repr=False)
    """On top of the run's own environment."""
    ready_path: str = "/health"
    """GET answers 200 there once requests can come."""
    notes: tuple[str, ...] = ()
    """What the user is to be told of it, once."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client needs to know of the run; an engine that runs already gets the same."""

    max_context_len: int
    vocab_size: int | None = None
    """Ids from here on are refused; None: the engine decides."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a response unless `ignore_eos`."""
    tokenizer: Tokenizer | None = None
    """Decodes responses; None: their text is empty."""
    model_dir: Path | None = None
    """Its config.json says how many experts there are, where an engine does not."""
    request_timeout_s: float = 14400.0
    token: str | None = field(default=None, repr=False)
    """Bearer token of an engine that wants one."""
