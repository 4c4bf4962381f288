"""`utils.dumper_utils` (miles): tells engines to write their tensors, where `args` asks for it."""

from __future__ import annotations

import asyncio
import enum
from typing import Any

from dovetail.compat.modules.http import post
from dovetail.compat.modules.wire import worker_urls

__all__ = ["DumperPhase", "configure_for_sglang", "get_env_for_sglang"]


class DumperPhase(enum.Enum):
    """Where tensors are written."""

    INFERENCE = "inference"
    FWD_ONLY = "fwd_only"
    FWD_BWD = "fwd_bwd"


def get_env_for_sglang(args: Any) -> dict[str, str]:
    """Environment that an SGLang engine needs for it."""
    return {"DUMPER_SERVER_PORT": "reuse"} if _settings(args).get("enable") else {}


async def configure_for_sglang(args: Any) -> None:
    """Turn it on in every engine behind the router, into `args.dumper_dir`; or do nothing."""
    settings = _settings(args)
    if not settings.get("enable"):
        return
    bodies = [
        (url, {**settings, "dir": str(args.dumper_dir), "exp_name": f"engine_{number}"})
        for number, url in enumerate(await worker_urls(args))
    ]
    await asyncio.gather(*(post(f"{url}/dumper/configure", body) for url, body in bodies))


def _settings(args: Any) -> dict[str, Any]:
    """`args.dumper_inference`, a list of KEY=VALUE, over `args.dumper_enable`."""
    words = getattr(args, f"dumper_{DumperPhase.INFERENCE.value}", None) or []
    settings: dict[str, Any] = {"enable": bool(getattr(args, "dumper_enable", False))}
    for word in words:
        name, _, value = str(word).partition("=")
        settings[name] = value.lower() in ("true", "1", "") if name == "enable" else value
    return settings
