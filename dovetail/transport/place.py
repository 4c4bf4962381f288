"""Where the weights of one run lie for engines that read files: a directory of its own.

    <parent>/dovetail-weights-<user>-XXXXXXXX/     locked while the run lives
        common/                                    config and tokenizer

The parent is /dev/shm, where a file is memory that every process of the machine can map, or a
directory of the user's. `close` removes everything; of a run that was killed its keeper does, and
where that was killed too, the next run.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dovetail.config.leaves import cure
from dovetail.transport import keeper
from dovetail.types.errors import ConfigError

Transport = Literal["auto", "shared_memory", "cuda_ipc", "broadcast", "disk"]

SHARED_MEMORY = Path("/dev/shm")
MANIFEST = "dovetail_weights.json"
COMMON = "common"
LOOPBACK = "127.0.0.1"
BUCKET_BYTES = 256 << 20
_LOCK = ".lock"
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_MOST_COMMON_BYTES = 256 << 20
_VERSIONS_AT_ONCE = 2
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """How weights are to travel."""

    transport: Transport = "auto"
    disk_dir: Path | None = None
    num_bytes: int = 0
    """Of all tensors together; 0: not known."""
    bucket_bytes: int = BUCKET_BYTES
    """Of one file, or of what is on its way at a time."""
    local: bool = True
    """Every engine is on this machine."""
    locks: bool = True
    """Every engine locks what it reads, so that memory can be written again."""
    delta: bool = False
    """On a disk, write only what changed."""
    digests: bool = False
    """Tell a digest of each tensor that is sent."""
    host: str = LOOPBACK
    """Address of this process, as engines reach it."""
    backend: str = "gloo"
    """Of process groups."""


class Place:
    """The directory of one run.

    Args:
        wanted: where to, and how much it will be.
        model_dir: Hugging Face directory whose configuration and tokenizer lie beside the weights.

    Raises:
        ConfigError: there is no such place, or too little space.
    """

    def __init__(self, wanted: Wanted, model_dir: Path) -> None:
        parent = _place(wanted)
        self.in_memory = parent == SHARED_MEMORY
        self._lock: int | None
        clear_leftovers(parent)
        try:
            self.directory, self._lock = _own_directory(parent)
            # Engines of other users read it in a directory that the user chose.
            self.directory.chmod(0o700 if self.in_memory else 0o755)
            _copy_common(model_dir, self.directory / COMMON)
        except OSError as error:
            raise ConfigError(f"{parent} can't be written: {error}; {other_place()}") from error
        self._janitor = _start_janitor(self.directory)

    def close(self) -> None:
        """Remove everything. A second call does nothing."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._janitor.terminate()
        self._janitor.wait()


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
        raise ConfigError(f"no weights can be written to {parent}: {error}; {other_place()}") from (
            error
        )
    if free < needed:
        raise ConfigError(
            f"{parent} has {gb(free)} free; two versions of the weights need {gb(needed)} on "
            f"their way to the engines; {other_place()}"
        )
    return parent.resolve()


def other_place() -> str:
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


def gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
