"""Tensors in files of safetensors form, written straight from where they lie, one at a time: a
tensor need not stay when the next one comes.

    8 bytes: length of the header | header, padded to HEADER_BYTES | tensors, one behind the other

A file is closed when the next tensor does not fit its bytes, its header or its alignment. The
header is written last: what breaks off before leaves a file that nobody takes for whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

if TYPE_CHECKING:
    import torch

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]

HASH = "sha256"
HEADER_BYTES = 128 << 10
"""Of the length and the header together."""
_ENTRY_BYTES = 160
"""Of one tensor in a header, beside its name and shape."""
_CHUNK_BYTES = 32 << 20
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of torch -> names in a file."""
TORCH_DTYPES = {short: name for name, short in DTYPES.items()}


class Layout:
    """What lies where in one file."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Most bytes of all tensors."""
        self.entries: dict[str, dict[str, Any]] = {}
        self.num_bytes = 0
        self._header = 256

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it fits behind what is there."""
        grown = self._header + _ENTRY_BYTES + 4 * len(name) + 20 * tensor.dim()
        if self.num_bytes + tensor.nbytes > self.capacity or grown > HEADER_BYTES:
            return False
        return self.num_bytes % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Put it behind what is there; its first byte, counted from the header's end."""
        start = self.num_bytes
        self.entries[name] = {
            "dtype": DTYPES[dtype_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        self._header += _ENTRY_BYTES + 4 * len(name) + 20 * tensor.dim()
        self.num_bytes += tensor.nbytes
        return start

    def header(self, version: int) -> bytes:
        """All that stands before the tensors."""
        about = {"__metadata__": {"format": "pt", "version": str(version)}}
        text = json.dumps({**about, **self.entries}, separators=(",", ":")).encode()
        length = HEADER_BYTES - 8
        assert len(text) <= length, "a header is closed before it is full"
        return length.to_bytes(8, "little") + text.ljust(length)


class TensorFile(Protocol):
    """One file under way."""

    layout: Layout

    def put(self, name: str, tensor: torch.Tensor) -> None: ...

    def finish(self, version: int) -> tuple[int, str | None]:
        """Make it whole; its size in bytes, and its digest where there is one."""
        ...

    def drop(self) -> None:
        """Let go of what broke off."""
        ...


class StreamedFile:
    """A file on a disk, which gets a digest.

    Raises:
        OSError: it can't be written in full.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.layout = Layout(capacity)
        self._file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115 (see finish, drop)
        self._file.seek(HEADER_BYTES)
        self._digest = hashlib.new(HASH)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write its bytes behind the last ones."""
        self.layout.add(name, tensor)
        data = bytes_of(tensor)
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            self._digest.update(chunk)
            self._write(chunk)

    def finish(self, version: int) -> tuple[int, str | None]:
        """As `TensorFile.finish`."""
        header = self.layout.header(version)
        self._digest.update(header)
        self._file.seek(0)
        self._write(memoryview(header))
        self._file.close()
        return HEADER_BYTES + self.layout.num_bytes, self._digest.hexdigest()

    def drop(self) -> None:
        """As `TensorFile.drop`."""
        self._file.close()

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]


def file_digest(path: Path) -> str:
    """Of the tensors and then the header, in which order they are written."""
    digest = hashlib.new(HASH)
    with open(path, "rb", buffering=0) as file:
        header = file.read(HEADER_BYTES)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    digest.update(header)
    return digest.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of its bytes, wherever they lie."""
    return hashlib.new(HASH, bytes_of(tensor)).hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its bytes in order; a copy only where they lie on a GPU, or not in order."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw)


def dtype_name(tensor: torch.Tensor) -> str:
    """As torch spells it, without `torch.`: `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_in(buffer: Any, offset: int, dtype: str, shape: list[int]) -> torch.Tensor:
    """A view of bytes as a tensor.

    Args:
        buffer: what has them, e.g. a mapped file.
        offset: of the first one.
        dtype: as torch spells it.
    """
    import math

    import torch

    kind, count = getattr(torch, dtype), math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(buffer, dtype=kind, count=count, offset=offset).view(shape)
