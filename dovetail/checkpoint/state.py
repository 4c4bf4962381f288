"""One part of a checkpoint on disk: tensors as safetensors, facts as JSON. No pickle, in or out.

Tensors are written one at a time from where they are, so a part never stands in host memory twice,
and a tensor that is a view is written with its own bytes, not those of its whole storage. Names
that are the same tensor (tied embeddings) are written once and are one tensor again after reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.types.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TENSORS_SUFFIX = ".safetensors"
FACTS_SUFFIX = ".json"
_FACTS, _ALIASES = "facts", "aliases"

# safetensors format: https://github.com/huggingface/safetensors#format
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
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """A part that can be written: everything that could be refused has been."""

    header: bytes
    tensors: list[torch.Tensor]
    """In the order of their bytes in the file."""
    facts: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return len(self.header) + len(self.facts) + sum(_nbytes(t) for t in self.tensors)

    def tensor_chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the safetensors file."""
        yield self.header
        for tensor in self.tensors:
            if tensor.numel():
                yield _raw_bytes(tensor)


def encode_part(
    name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> EncodedPart:
    """Lay out tensors and facts of the part `name` for writing; nothing is copied yet.

    Raises:
        CheckpointError: a tensor's kind or a fact's type can't be stored; the message says where.
    """
    kept, aliases = _split_aliases(name, tensors)
    # Large elements first: each tensor then starts at a multiple of its element size.
    order = sorted(kept, key=lambda key: (-kept[key].element_size(), key))
    header: dict[str, Any] = {}
    offset = 0
    for key in order:
        end = offset + _nbytes(kept[key])
        header[key] = {
            "dtype": _dtype_code(name, key, kept[key]),
            "shape": list(kept[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _check_plain(facts, f"{name}.facts")
    body = json.dumps(
        {_FACTS: dict(facts), _ALIASES: aliases}, separators=(",", ":"), default=_as_list
    ).encode()
    return EncodedPart(len(text).to_bytes(8, "little") + text, [kept[key] for key in order], body)


def decode_part(directory: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the part `name` that `encode_part` laid out; tensors are on the CPU.

    Raises:
        ValueError: a file is not what was written.
        OSError: a file can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    body = _body(directory, name)
    aliases = body.get(_ALIASES)
    if not isinstance(aliases, dict):
        raise ValueError(f"{name}{FACTS_SUFFIX} has no object '{_ALIASES}'")
    try:
        tensors = load_file(directory / f"{name}{TENSORS_SUFFIX}")
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{name}{TENSORS_SUFFIX} is not readable: {error}") from error
    for alias, original in aliases.items():
        if not isinstance(original, str) or original not in tensors:
            raise ValueError(f"{name}{FACTS_SUFFIX}: '{alias}' has no tensor to share")
        tensors[alias] = tensors[original]
    return tensors, body[_FACTS]


def decode_facts(directory: Path, name: str) -> dict[str, Any]:
    """The facts of the part `name`, which wrote its tensors itself.

    Raises:
        ValueError: the file is not what was written.
        OSError: it can't be read.
    """
    return _body(directory, name)[_FACTS]


def _body(directory: Path, name: str) -> dict[str, Any]:
    try:
        body = json.loads((directory / f"{name}{FACTS_SUFFIX}").read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}{FACTS_SUFFIX} is not readable JSON: {error}") from error
    if not (isinstance(body, dict) and isinstance(body.get(_FACTS), dict)):
        raise ValueError(f"{name}{FACTS_SUFFIX} has no object '{_FACTS}'")
    return body


def _split_aliases(
    name: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that hold their own elements; and for every other name, whose elements it shares."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_at: dict[tuple[Any, ...], str] = {}
    for key, tensor in tensors.items():
        _check_storable(name, key, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first_at:
            aliases[key] = first_at[place]
        else:
            first_at[place] = key
            kept[key] = tensor
    return kept, aliases


def _check_storable(name: str, key: str, tensor: torch.Tensor) -> None:
    import torch

    where = f"part '{name}', tensor '{key}'"
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{where}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise CheckpointError(
            f"{where}: {tensor.layout} on {tensor.device} has no plain bytes to store"
        )


def _dtype_code(name: str, key: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise CheckpointError(f"part '{name}', tensor '{key}': {dtype} does not fit safetensors")
    return _DTYPES[dtype]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _check_plain(value: Any, where: str) -> None:
    """Refuse what JSON would lose without a word: keys that are no text, and unknown types.

    Arrays and scalars of numpy and torch pass; they come back as lists and numbers.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{where}: key {key!r} is {type(key).__name__}, text is expected"
                )
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if type(item) not in (int, float, str):
                _check_plain(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, str | int | float) or hasattr(value, "tolist")):
        raise CheckpointError(
            f"{where}: {type(value).__name__} can't be stored as JSON; "
            "use text, numbers, lists, objects with text keys, or put tensors among the tensors"
        )


def _as_list(value: Any) -> Any:
    """Arrays and scalars of numpy and torch as lists and numbers, for JSON."""
    return value.tolist()
