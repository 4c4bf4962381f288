"""The receiving side of a snapshot: nothing of it is used unless all of it arrived."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.transport.snapshot import MANIFEST
from dovetail.transport.tensor_files import HASH, read_tensors
from dovetail.types.errors import EngineError

if TYPE_CHECKING:
    import torch

_READ_BYTES = 4 << 20


def check_whole(directory: Path) -> int:
    """The version of the weights in `directory`, all of which are there as they were written.

    Sizes are always compared; digests where the writer made them, which is on disks.

    Raises:
        EngineError: it is not a snapshot, or damaged.
    """
    manifest = _manifest(directory)
    for name, facts in manifest["files"].items():
        path = directory / name
        _check_size(path, facts["size_bytes"])
        if facts["sha256"] is not None and _digest(path) != facts["sha256"]:
            raise EngineError(f"the weights in {path} are not those that were written")
    return int(manifest["version"])


def read_snapshot(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a snapshot by name, after `check_whole`.

    Raises:
        EngineError: it is not a snapshot, or damaged.
    """
    check_whole(directory)
    for name in _manifest(directory)["files"]:
        yield from read_tensors(directory / name)


def is_snapshot(directory: Path) -> bool:
    """Whether a run wrote it, so that `check_whole` can be asked."""
    return (directory / MANIFEST).is_file()


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
        files = found["files"]
        good = isinstance(found["version"], int) and isinstance(files, dict)
        for name, facts in files.items():
            good = good and os.path.basename(name) == name
            good = good and isinstance(facts["size_bytes"], int) and "sha256" in facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{directory} has no readable weights: {error!r}") from error
    if not good:
        raise EngineError(f"{directory / MANIFEST} is damaged")
    return found


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise EngineError(f"{path} can't be read: {error.strerror}") from error
    if size != expected:
        raise EngineError(f"{path} has {size} bytes, {expected} were written")


def _digest(path: Path) -> str:
    digest = hashlib.new(HASH)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
