"""Weights on their way from the trainer to engines in other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MEETINGS = ("broadcast", "cuda_ipc")
"""Transports by which engines meet the trainer's rank 0, so that nothing lies anywhere."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where engines meet the trainer's rank 0, to be given weights hand to hand."""

    transport: str
    """One of `MEETINGS`."""
    host: str
    port: int
    name: str
    """Of this one update, and of this one try."""
    num_engines: int
    backend: str
    """Of the process group: `gloo` or `nccl`."""
    patience_s: float
    """Longest wait for one another."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The weights of one version, as engines are given them.

    As a directory in Hugging Face form (safetensors, with an index where there are several files)
    it stays until every engine has a later one, so that an engine that starts meanwhile finds it.
    Where engines meet the trainer instead, there is nothing to be found afterwards.
    """

    version: int
    directory: Path | None
    num_bytes: int
    """Of all tensors together; 0: not known."""
    meeting: Meeting | None = None
    digests: Mapping[str, str] | None = None
    """SHA-256 of each tensor's bytes by its Hugging Face name; None: nobody asked."""

    @property
    def lasting(self) -> bool:
        """Whether an engine that starts later finds it."""
        return self.meeting is None
