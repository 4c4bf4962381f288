"""Whether a file that a library will unpickle names nothing but plain classes.

`torch.distributed.checkpoint`, below Megatron's checkpoints, keeps its table of contents as a
pickle. Its instructions are read here, not run: whatever they would import has to be on a list.
"""

from __future__ import annotations

import pickletools
from pathlib import Path

from dovetail.types.errors import CheckpointError

_ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
_ALLOWED = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "Path"),
    *(("torch", name) for name in _DTYPES),
}
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
        if module not in _ALLOWED_MODULES and (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"{file} asks for {module}.{name} when it is read, which no checkpoint of "
                "Megatron's needs: it could run code. It is not read"
            )


def _imports(content: bytes) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    memo: dict[int, str] = {}
    pushed: list[str] = []
    last: str | None = None
    for opcode, argument, _ in pickletools.genops(content):
        kind = opcode.name
        if kind in _FOREIGN:
            raise ValueError(f"it has the instruction {kind}")
        if kind in _STRINGS:
            last = str(argument)
            pushed.append(last)
        elif kind == "MEMOIZE":
            if last is not None:
                memo[len(memo)] = last
            else:
                memo[len(memo)] = ""
        elif kind in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument or 0)] = last or ""
        elif kind in ("BINGET", "LONG_BINGET", "GET"):
            last = memo[int(argument or 0)]
            pushed.append(last)
        elif kind == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            found.append((module, name))
            last = None
        elif kind == "STACK_GLOBAL":
            found.append((pushed[-2], pushed[-1]))
            last = None
        else:
            last = None
    return found
