"""`utils.lora` (miles): whether a run trains an adapter."""

from __future__ import annotations

from typing import Any

__all__ = ["LORA_ADAPTER_NAME", "is_lora_enabled", "lora_rollout_enabled"]

LORA_ADAPTER_NAME = "dovetail_lora"
"""What engines know the one adapter of a run as."""


def is_lora_enabled(args: Any) -> bool:
    """An adapter is trained: `args.lora_rank` is set, or `args.lora_adapter_path` names one."""
    return bool(getattr(args, "lora_rank", 0)) or bool(getattr(args, "lora_adapter_path", None))


def lora_rollout_enabled(args: Any) -> bool:
    """Engines sample with the adapter."""
    return is_lora_enabled(args)
