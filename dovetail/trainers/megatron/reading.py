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
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_KEEPS = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
_GIVES = {"BINGET", "LONG_BINGET"}
_PLAIN = {
    *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_SET", "ADDITEMS", "FROZENSET", "REDUCE", "NEWOBJ", "BUILD"),
}
"""What pickles of protocols 2 to 5 are made of. None of these brings in a name, or takes away what
lies on top, so that the two strings before STACK_GLOBAL are those it takes."""


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
    memo: dict[int, str | None] = {}
    top: list[str] = []
    """The strings that were put on the stack last, with nothing after them."""
    for opcode, argument, place in pickletools.genops(content):
        name = opcode.name
        if name in _KEEPS:
            memo[len(memo) if argument is None else int(argument)] = top[-1] if top else None
            continue
        text = str(argument) if name in _STRINGS else None
        if name in _GIVES:
            text = memo[int(argument or 0)]
        if text is not None:
            top.append(text)
            continue
        if name == "GLOBAL":
            module, _space, named = str(argument).partition(" ")
            found.append((module, named))
        elif name == "STACK_GLOBAL":
            if len(top) < 2:
                raise ValueError(f"at byte {place} it imports what is not told right before")
            found.append((top[-2], top[-1]))
        elif name not in _PLAIN | _GIVES:
            raise ValueError(f"it has the instruction {name}, which no such table has")
        top = []
    return found
