"""Settings of engine and trainer owners, handed through by prefix: --vllm-*, --sglang-*, ..."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

PREFIXES = ("vllm", "sglang", "megatron")
"""Each is also a TOML table: `[vllm] max_num_seqs = 64` is `--vllm-max-num-seqs 64`."""


_SCALAR = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?|true|false|null")


def is_passthrough(name: str) -> bool:
    """Whether a leaf-like name (`vllm_max_num_seqs`) belongs to somebody else's settings."""
    return name.partition("_")[0] in PREFIXES and "_" in name


def typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Handed-through settings as hooks read them from `args`: flags' text as numbers and truth
    values where it is such."""
    return {
        name: json.loads(value.lower())
        if isinstance(value, str) and _SCALAR.fullmatch(value.lower())
        else value
        for name, value in settings.items()
    }


def handed(settings: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """What is handed through to one owner, by its own names."""
    prefix = f"{owner}_"
    return {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}


def without_effect_notes(
    names: Iterable[str], owner: str | None, trainer: str | None = None
) -> list[str]:
    """A line for all handed-through settings that nothing in this run reads; `owner`: the prefix of
    those that its engines do, `trainer`: its trainer."""
    idle = [name for name in names if name.partition("_")[0] not in (owner, trainer)]
    if not idle:
        return []
    flags = ", ".join("--" + name.replace("_", "-") for name in idle)
    starts = {"vllm": "vLLM", "sglang": "SGLang", "megatron": "Megatron"}
    none = [word for prefix, word in starts.items() if prefix not in (owner, trainer)]
    return [f"kept, but without effect in this run: {flags} (it starts no {' or '.join(none)})"]
