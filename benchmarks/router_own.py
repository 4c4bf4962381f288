"""Dovetail's router in a process of its own, as a fleet serves it.

    python -m benchmarks.router_own --port 31010 --engine 31000 --way proxy --dialect sglang

`proxy` passes requests on as they are; `bridge` reads every request, asks the engine in its own
form, and puts the answer into words again.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import uvloop

from dovetail.engines.launch import ClientSettings
from dovetail.engines.sglang.client import SglangEngine
from dovetail.router.balancer.pool import Pool
from dovetail.router.bridge import Bridge
from dovetail.router.server import RouterServer
from dovetail.router.workers import Behind
from dovetail.run.heap import settled_heap


class Letters:
    """A tokenizer that costs little: one token per character."""

    eos_token_id = pad_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


async def serve(port: int, engine_port: int, way: str, dialect: str, policy: str) -> None:
    """Serve until the process is ended."""
    pool = Pool(policy=policy)
    settings = ClientSettings(4096, tokenizer=Letters())
    engine = SglangEngine(f"http://127.0.0.1:{engine_port}", settings)
    engine.dialect = dialect  # type: ignore[misc]
    pool.add(engine)
    bridge = Bridge(lambda: pool, lambda: settings.tokenizer, model="m")
    server = RouterServer(bridge, port, behind=Behind(pool) if way == "proxy" else None)
    await server.serve_here()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", type=int, required=True)
    parser.add_argument("--way", choices=["proxy", "bridge"], required=True)
    parser.add_argument("--dialect", choices=["sglang", "vllm"], default="sglang")
    parser.add_argument("--policy", default="cache_aware")
    given = parser.parse_args()
    with settled_heap():
        uvloop.run(serve(given.port, given.engine, given.way, given.dialect, given.policy))
