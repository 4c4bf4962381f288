"""Takes weights that lie in a directory into a running vLLM worker, through vLLM's own weight
transfer: `/start_weight_update`, `/update_weights`, `/finish_weight_update`.

Runs inside the server's workers; of Dovetail nothing is imported. Importing this module registers
the backend, so the server is started with

    --worker-extension-cls dovetail_vllm_receiver.SnapshotExtension
    --weight-transfer-config '{"backend": "dovetail_snapshot"}'

Everything about a snapshot that can be wrong is looked at before the model is touched: what is
refused leaves the old weights as they were.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "dovetail_snapshot"
REFUSED = "snapshot refused"
"""Begins every message of an error that left the old weights in place."""
_MANIFEST = "dovetail_weights.json"
_READ_BYTES = 4 << 20
_HEADER_BYTES = 128 << 10
"""What stands before the tensors of a file that the run wrote."""

Shapes = dict[str, tuple[int, ...]]


class SnapshotRefusedError(RuntimeError):
    """The directory can't be taken; nothing was touched."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{REFUSED}: {message}")


@dataclass
class SnapshotInitInfo(WeightTransferInitInfo):
    """Nothing is set up beforehand."""


@dataclass
class SnapshotUpdateInfo(WeightTransferUpdateInfo):
    """One whole set of weights."""

    directory: str
    num_bytes: int
    """Of all tensors together."""


class SnapshotEngine(WeightTransferEngine[SnapshotInitInfo, SnapshotUpdateInfo]):
    """Reads safetensors files of Hugging Face names into the model."""

    init_info_cls = SnapshotInitInfo
    update_info_cls = SnapshotUpdateInfo
    supports_draft_weight_update = False
    _expected: Shapes | None = None
    """Names and shapes of the weights that the server started with."""
    _damage: str | None = None

    def init_transfer_engine(self, init_info: SnapshotInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Nothing yet: the model stays whole until a snapshot has been looked at."""

    def finish_weight_update(self) -> None:
        """Refuse to call the weights new when they are half old.

        Raises:
            RuntimeError: an update broke off in the middle.
        """
        if self._damage is not None:
            raise RuntimeError(self._damage)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """As the base class, which can't wait for a device on a machine that has none."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SnapshotUpdateInfo) -> None:
        """Look at the snapshot, then load all of it.

        Raises:
            SnapshotRefusedError: a file is missing or cut off, or names, shapes or the number of
                bytes are not those expected.
            RuntimeError: loading broke off; the model is of no use until a snapshot is loaded.
        """
        with contextlib.ExitStack() as stack:
            self._load(Path(update_info.directory), update_info.num_bytes, stack)

    def _load(self, directory: Path, num_bytes: int, stack: contextlib.ExitStack) -> None:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        for file in _files(directory):
            _lock(file, stack)
        files = self._looked_at(directory, num_bytes)
        self._damage = f"an update from {directory} broke off in the middle"
        if self.device.type == "cpu":
            _unpack_experts(self.model)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(_tensors(files))
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_heads(self.model)
        self._damage = None

    def shutdown(self) -> None:
        """Nothing is held."""

    def _looked_at(self, directory: Path, num_bytes: int) -> list[Path]:
        files = _files(directory)
        _check_digests(directory)
        _check_versions(directory, files)
        shapes, found_bytes = _headers(files)
        if found_bytes != num_bytes:
            raise SnapshotRefusedError(
                f"{directory} has tensors of {found_bytes} bytes, {num_bytes} were announced"
            )
        if self._expected is None:
            self._expected = self._first_shapes() or shapes
        wrong = _differences(self._expected, shapes)
        if wrong:
            raise SnapshotRefusedError(f"{directory}: {'; '.join(wrong[:4])}")
        return files

    def _first_shapes(self) -> Shapes | None:
        directory = Path(self.model_config.model)
        try:
            return _headers(_files(directory))[0]
        except SnapshotRefusedError:
            return None  # Loaded from a hub, or dummy weights: the first snapshot says.


def _check_digests(directory: Path) -> None:
    """What went over a disk is what was written; its writer left digests there."""
    manifest = directory / _MANIFEST
    known = json.loads(manifest.read_bytes())["files"] if manifest.is_file() else {}
    for name, facts in known.items():
        digest = hashlib.sha256()
        if facts["sha256"] is None:
            continue
        with open(directory / name, "rb", buffering=0) as file:
            # The tensors and then the header, in which order they were written.
            header = file.read(_HEADER_BYTES)
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
        digest.update(header)
        if digest.hexdigest() != facts["sha256"]:
            raise SnapshotRefusedError(f"{directory / name} is not what was written")


def _check_versions(directory: Path, files: list[Path]) -> None:
    """Files of memory may have been written again since they were announced."""
    manifest = directory / _MANIFEST
    if not manifest.is_file():
        return
    version = str(json.loads(manifest.read_bytes())["version"])
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found = (opened.metadata() or {}).get("version", version)
        if found != version:
            raise SnapshotRefusedError(f"{file} has version {found} by now, not {version}")


class SnapshotExtension:
    """Adds nothing to the worker: to name it is to import this module there."""


def _unpack_experts(model: torch.nn.Module) -> None:
    """Have experts set up anew when their weights have come.

    On a CPU a kernel packs the weights of its experts when it is set up; vLLM 0.32 keeps the kernel
    over a reload, and would put plain weights where it reads packed ones.
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_heads(model: torch.nn.Module) -> None:
    """Bring the packed copies of embeddings and heads up to date.

    On a CPU vLLM multiplies with a packed copy of a layer's weight, made when weights of that layer
    have been loaded. A head that is tied to the embedding gets none of its own, so that a reload
    (vLLM 0.32, `/collective_rpc` reload_weights too) leaves its copy as it was.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(layer)


def _files(directory: Path) -> list[Path]:
    """The files, all those of the index where there is one."""
    index = directory / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(directory / name for name in names)
        else:
            files = sorted(directory.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SnapshotRefusedError(f"{index}: {type(error).__name__}: {error}") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise SnapshotRefusedError(f"{directory} lacks {', '.join(missing) or 'safetensors files'}")
    return files


def _lock(file: Path, stack: contextlib.ExitStack) -> None:
    """Have nobody write the file as long as the stack is open: the run writes memory again that no
    engine reads."""
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SnapshotRefusedError(f"{file} is being written over") from error
    except OSError:
        return  # A file system without locks, on which no file is written twice.


def _headers(files: list[Path]) -> tuple[Shapes, int]:
    """Shapes by name, and the bytes of all tensors. Opening a file compares its header with its
    size."""
    shapes: Shapes = {}
    num_bytes = 0
    for file in files:
        try:
            found = _header(file)
        except (OSError, SafetensorError) as error:
            raise SnapshotRefusedError(f"{file}: {type(error).__name__}: {error}") from error
        for name, (shape, size) in found.items():
            shapes[name] = shape
            num_bytes += size
    return shapes, num_bytes


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes by name."""
    found = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.offset_keys():
            piece = opened.get_slice(name)
            shape = tuple(piece.get_shape())
            found[name] = (shape, _size_of(piece.get_dtype()) * math.prod(shape))
    return found


def _size_of(dtype: str) -> int:
    bits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(bits) // 8 if bits else 1


def _differences(expected: Shapes, found: Shapes) -> list[str]:
    """What keeps `found` from taking the place of `expected`.

    A head that is tied to the embedding may be there or not.
    """
    tied = {"lm_head.weight"}
    lacking = sorted(expected.keys() - found.keys() - tied)
    strange = sorted(found.keys() - expected.keys() - tied)
    both = expected.keys() & found.keys()
    changed = sorted(name for name in both if expected[name] != found[name])
    return [
        *(f"{name} is missing" for name in lacking),
        *(f"{name} is no weight of this model" for name in strange),
        *(
            f"{name} is {list(found[n])}, not {list(expected[n])}"
            for name in changed
            for n in [name]
        ),
    ]


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.offset_keys():
                yield name, opened.get_tensor(name)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SnapshotEngine)
