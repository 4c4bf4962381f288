"""Weights for engines in other processes: a directory per version, whole or not there.

    <parent>/dovetail-weights-<user>-XXXXXXXX/     of one run, locked while the run lives
        common/                                    config and tokenizer
        000007/                                    version 7: safetensors, and links to the common
            dovetail_weights.json                  files: sizes, and on a disk digests

The parent is /dev/shm, where a file is memory that every process of the machine can map, or a
directory of the user's. A version is kept until `retire` says that nobody needs it; the last one
stays, for engines that start later. `close` removes everything; of a run that was killed its keeper
does, and where that was killed too, the next run.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dovetail.config.leaves import cure
from dovetail.transport import keeper
from dovetail.transport.tensor_files import NamedTensors, in_buckets, write_tensors
from dovetail.types.errors import ConfigError, EngineError
from dovetail.types.weights import Snapshot

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Transport = Literal["auto", "shared_memory", "cuda_ipc", "broadcast", "disk"]

SHARED_MEMORY = Path("/dev/shm")
MANIFEST = "dovetail_weights.json"
BUCKET_BYTES = 256 << 20
_INDEX = "model.safetensors.index.json"
_COMMON, _LOCK, _ASIDE = "common", ".lock", ".writing"
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_MOST_COMMON_BYTES = 256 << 20
_VERSIONS_AT_ONCE = 2
_SPARE_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How weights are to travel."""

    transport: Transport = "auto"
    disk_dir: Path | None = None
    num_bytes: int = 0
    """Of all tensors together; 0: not known."""
    bucket_bytes: int = BUCKET_BYTES
    """Of one file."""
    local: bool = True
    """Every engine is on this machine."""


class SnapshotStore:
    """Writes versions of the weights where engines read them.

    Args:
        wanted: where to, and how much it will be.
        model_dir: Hugging Face directory whose configuration and tokenizer lie beside the weights.

    Raises:
        ConfigError: there is no such place, or too little space.
    """

    def __init__(self, wanted: Wanted, model_dir: Path) -> None:
        parent = _place(wanted)
        self.in_memory = parent == SHARED_MEMORY
        self._wanted = wanted
        self._lock: int | None
        clear_leftovers(parent)
        try:
            self.directory, self._lock = _own_directory(parent)
            # Engines of other users read it in a directory that the user chose.
            self.directory.chmod(0o700 if self.in_memory else 0o755)
            _copy_common(model_dir, self.directory / _COMMON)
        except OSError as error:
            raise ConfigError(f"{parent} can't be written: {error}; {_other_place()}") from error
        self._janitor = _start_janitor(self.directory)
        self._kept: dict[int, Snapshot] = {}

    def write(self, version: int, tensors: NamedTensors) -> Snapshot:
        """A directory with these tensors under their names, each once. Blocks.

        Raises:
            EngineError: it can't be written in full; nothing of it is left.
        """
        started = time.perf_counter()
        aside = self.directory / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        try:
            num_bytes = self._write_all(aside, version, tensors)
            target = self.directory / f"{version:06d}"
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        except OSError as error:
            raise self._failed(version, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        snapshot = self._kept[version] = Snapshot(version, target, num_bytes)
        seconds = time.perf_counter() - started
        log.info("weights of version %d: %d bytes in %.2f s", version, num_bytes, seconds)
        return snapshot

    def retire(self, before: int) -> None:
        """Remove every version before this one: all engines have it, or a later one."""
        for version in [one for one in self._kept if one < before]:
            shutil.rmtree(self._kept.pop(version).directory, ignore_errors=True)

    def close(self) -> None:
        """Remove everything. A second call does nothing."""
        self._kept.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._janitor.terminate()
        self._janitor.wait()

    def _write_all(self, aside: Path, version: int, tensors: NamedTensors) -> int:
        aside.mkdir()
        weight_map: dict[str, str] = {}
        files: dict[str, dict[str, object]] = {}
        num_bytes, hashed = 0, not self.in_memory
        for number, bucket in enumerate(in_buckets(tensors, self._wanted.bucket_bytes), start=1):
            name = f"model-{number:05d}.safetensors"
            size, digest = write_tensors(aside / name, bucket, hashed=hashed)
            files[name] = {"size_bytes": size, "sha256": digest}
            weight_map.update((tensor, name) for tensor, _ in bucket)
            num_bytes += _bytes_of(bucket)
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (aside / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        for path in (self.directory / _COMMON).iterdir():
            os.link(path, aside / path.name)
        manifest = {"version": version, "num_bytes": num_bytes, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        return num_bytes

    def _failed(self, version: int, error: OSError) -> EngineError:
        free = shutil.disk_usage(self.directory).free
        why = f"{error.strerror or error}, {_gb(free)} are free"
        if error.errno in _FULL and self._wanted.num_bytes:
            why += f"; one version needs {_gb(self._wanted.num_bytes)}, and two are kept for a time"
        return EngineError(
            f"the weights of version {version} can't be written to {self.directory}: {why}; "
            f"{_other_place()}"
        )


def clear_leftovers(parent: Path) -> list[Path]:
    """Remove what dead runs of this user left below `parent`; what was there."""
    found = []
    for path in parent.glob(f"{_prefix()}*"):
        lock = _locked(path) if path.is_dir() and not path.is_symlink() else None
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            found.append(path)
    return found


def _own_directory(parent: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        lock = _locked(directory)
        # Else another run, clearing up, found it before it was locked.
        if lock is not None:
            return directory, lock


def _locked(directory: Path) -> int | None:
    """A lock on the directory that lasts as long as this process; None: another one has it."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(directory / _LOCK, flags, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _start_janitor(directory: Path) -> subprocess.Popen[bytes]:
    """What removes the directory when this process is killed."""
    command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid())]
    return subprocess.Popen(
        [*command, "--remove", str(directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _place(wanted: Wanted) -> Path:
    """Shared memory where it is enough, else the directory.

    Raises:
        ConfigError: neither will do.
    """
    disk, needed = wanted.disk_dir, _VERSIONS_AT_ONCE * wanted.num_bytes + _SPARE_BYTES
    if wanted.transport == "disk" or not wanted.local:
        if disk is None:
            raise ConfigError(
                "weights reach engines of other machines, and those of weight_transport 'disk', "
                f"through files that they can read; {cure('update_weight_disk_dir', 'DIR')}"
            )
        return _with_room(disk, needed)
    if wanted.transport == "auto" and disk is not None and not _fits(SHARED_MEMORY, needed):
        return _with_room(disk, needed)
    return _with_room(SHARED_MEMORY, needed)


def _fits(parent: Path, needed: int) -> bool:
    return parent.is_dir() and shutil.disk_usage(parent).free >= needed


def _with_room(parent: Path, needed: int) -> Path:
    try:
        if parent != SHARED_MEMORY:
            parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ConfigError(
            f"no weights can be written to {parent}: {error}; {_other_place()}"
        ) from (error)
    if free < needed:
        raise ConfigError(
            f"{parent} has {_gb(free)} free; two versions of the weights need {_gb(needed)} on "
            f"their way to the engines; {_other_place()}"
        )
    return parent.resolve()


def _other_place() -> str:
    return f"name another place: {cure('update_weight_disk_dir', 'DIR')}"


def _prefix() -> str:
    return f"dovetail-weights-{getpass.getuser()}-"


def _copy_common(model_dir: Path, target: Path) -> None:
    """Everything of a model's directory but its weights."""
    target.mkdir()
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and _is_common(path):
            shutil.copyfile(path, target / path.name)


def _is_common(path: Path) -> bool:
    if path.name.endswith((".index.json", MANIFEST)) or path.suffix in _WEIGHT_ENDINGS:
        return False
    return not path.name.startswith(".") and path.stat().st_size <= _MOST_COMMON_BYTES


def _bytes_of(tensors: list[tuple[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for _, tensor in tensors)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
