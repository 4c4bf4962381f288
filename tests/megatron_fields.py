"""Makes the list of what `--megatron-*` may set: `dovetail/trainers/megatron/fields.txt`.

    python tests/megatron_fields.py > dovetail/trainers/megatron/fields.txt

Fields whose values are functions, or objects of Python, are left out: no flag can say them.
"""

import dataclasses
import sys
import typing
from importlib import metadata

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

_PLAIN = (bool, int, float, str, list, type(None))


def _can_be_said(kind: object) -> bool:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) in (list, tuple):
        return True
    if typing.get_origin(kind) is typing.Literal:
        return True
    return all(map(_can_be_said, parts)) if parts else kind in _PLAIN


def text() -> str:
    """The file: a line about the version, then a name and its classes a line."""
    found: dict[str, list[str]] = {}
    for owner in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig):
        kinds = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if _can_be_said(kinds[field.name]) or field.name == "attention_backend":
                found.setdefault(field.name, []).append(owner.__name__)
    version = metadata.version("megatron-core")
    lines = [f"{name} {' '.join(owners)}" for name, owners in sorted(found.items())]
    return "\n".join(
        [f"# megatron-core {version}, written by tests/megatron_fields.py", *lines, ""]
    )


if __name__ == "__main__":
    sys.stdout.write(text())
