"""Whether a file that a library will unpickle names nothing but plain classes.

`torch.distributed.checkpoint`, below Megatron's checkpoints, keeps its table of contents as a
pickle. Its instructions are read here, not run: whatever they would import has to be on a list.
"""

from __future__ import annotations

import pickletools
from pathlib import Path

from dovetail.types.errors import CheckpointError

_METADATA, _PLANNER = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (_PLANNER, name)
        for name in (
            *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    *(
        ("torch", name)
        for name in (
            *("Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
            *("int64", "int32", "int16", "int8", "uint8", "bool"),
        )
    ),
}
"""Whole names: a module that is allowed may have others in it."""
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
_FOREIGN = ("INST", "OBJ", "NEWOBJ_EX", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "DUP", "POP")
"""What torch's tables never have, and what could hide a name from this reading."""


def check_table(file: Path) -> None:
    """Refuse a table of contents that would import anything else.

    Raises:
        CheckpointError: it would, or it can't be read.
    """
    try:
        wanted = _imports(file.read_bytes())
    except (OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    for module, name in wanted:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"{file} asks for {module}.{name} when it is read, which no checkpoint of "
                "Megatron's needs: it could run code. It is not read"
            )


def _imports(content: bytes) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    memo: dict[int, str] = {}
    pushed: list[str] = []
    last = ""
    for opcode, argument, _place in pickletools.genops(content):
        match opcode.name:
            case name if name in _FOREIGN:
                raise ValueError(f"it has the instruction {name}")
            case name if name in _STRINGS:
                last = str(argument)
                pushed.append(last)
            case "MEMOIZE":
                memo[len(memo)] = last
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[int(argument or 0)] = last
            case "BINGET" | "LONG_BINGET" | "GET":
                last = memo[int(argument or 0)]
                pushed.append(last)
            case "GLOBAL":
                module, _space, name = str(argument).partition(" ")
                found.append((module, name))
                last = ""
            case "STACK_GLOBAL":
                found.append((pushed[-2], pushed[-1]))
                last = ""
            case _:
                last = ""
    return found
