"""Weights on their way from the trainer to engines in other processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The weights of one version as a directory in Hugging Face form that any process of the
    machine can read: safetensors, with an index where there are several files.

    It stays until every engine has a later one, so that an engine that starts meanwhile finds it.
    """

    version: int
    directory: Path
    num_bytes: int
    """Of all tensors together."""
