"""The stand-in engine behind the generation server, for functions that post to the router."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.world import WrittenEngine

_SIGNS = ("router_ip", "router_port", "get_model_url", "sglang_rollout", "vllm_rollout", "http_u")
_CONTEXT = 8192


@contextmanager
def served(stage: Stage, engine: WrittenEngine, tokenizer: Any) -> Iterator[None]:
    """Serve `engine` where `args` says that the router is, if the user's code can ask there."""
    if not _may_ask(stage):
        yield
        return
    from dovetail.router.bridge import Bridge
    from dovetail.router.server import RouterServer

    bridge = Bridge(
        lambda: engine,
        lambda: tokenizer,
        model=str(stage.config.model.hf_checkpoint or "rehearsal"),
        limits=lambda: (_CONTEXT, None),
    )
    server = RouterServer(bridge)
    for name in ("sglang_router", "vllm_router", "router"):
        stage.args.learn(**{f"{name}_ip": server.host, f"{name}_port": server.port})
    server.start(stage.loop)
    try:
        yield
    finally:
        server.close()


def _may_ask(stage: Stage) -> bool:
    """Whether a module of the user's mentions the router, or imported what asks there for it."""
    if "dovetail.compat.modules.http" in sys.modules:
        return True
    modules = [
        module
        for module in list(sys.modules.values())
        if (file := getattr(module, "__file__", None)) and stage.is_users(file)
    ]
    return any(sign in _source(module) for module in modules for sign in _SIGNS)


def _source(module: object) -> str:
    try:
        return inspect.getsource(module)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
