"""Tensors in files of safetensors form, written straight from where they lie: in memory there is
never a second copy of more than one tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]

HASH = "sha256"
_CHUNK_BYTES = 32 << 20
_ALIGNMENT = 8
_DTYPES = {
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


def in_buckets(
    tensors: NamedTensors, bucket_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors in their order, as many together as `bucket_bytes` hold; one at least."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, torch.Tensor]], *, hashed: bool
) -> tuple[int, str | None]:
    """Write one file; its size in bytes, and where `hashed` the hex digest of its content.

    Raises:
        OSError: it can't be written in full.
    """
    # Widest first, so that every tensor of the file is aligned.
    ordered = sorted(tensors, key=lambda one: -one[1].element_size())
    digest, size = hashlib.new(HASH) if hashed else None, 0
    with open(path, "xb", buffering=0) as file:
        for chunk in _chunks(ordered):
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
            if digest is not None:
                digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest() if digest is not None else None


def _chunks(tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    for _, tensor in tensors:
        data = _bytes_of(tensor)
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


def _header(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        entries[name] = {
            "dtype": _DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw)


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file, one after the other."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            yield name, file.get_tensor(name)
