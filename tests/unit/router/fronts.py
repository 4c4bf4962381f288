"""A pool with a server before it, and a client that speaks to engines in their own form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from dovetail.router.balancer.pool import Pool
from dovetail.router.bridge import Bridge
from dovetail.router.server import RouterServer
from dovetail.router.workers import Behind
from tests.faulty_engine import FaultyEngine, expected_ids
from tests.unit.router.scripted import Letters, Scripted

PROMPT = [5, 6, 7]


@dataclass
class Stub:
    """The client of an engine that only the proxy speaks to."""

    url: str
    dialect: str = "sglang"
    token: str | None = None
    aborted: Any = "never"

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self.aborted = request_ids

    async def close(self) -> None:
        pass


@dataclass
class Front:
    """A pool, a server before it, and a client."""

    pool: Pool
    url: str
    http: aiohttp.ClientSession

    async def generate(self, **fields: Any) -> tuple[int, Any]:
        body = {"input_ids": PROMPT, "rid": "r", **fields}
        async with self.http.post(f"{self.url}/generate", json=body) as reply:
            return reply.status, await reply.json()

    async def stream(self, path: str = "/generate", **fields: Any) -> list[Any]:
        body = {"input_ids": PROMPT, "stream": True, **fields}
        async with self.http.post(f"{self.url}{path}", json=body) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            text = (await reply.read()).decode()
        events = text.removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


@asynccontextmanager
async def front(*engines: FaultyEngine, **settings: Any) -> AsyncIterator[Front]:
    pool = Pool(**{"policy": "round_robin", "request_timeout_s": 30.0, **settings})
    for engine in engines:
        pool.add(Stub(engine.url, engine.dialect))  # type: ignore[arg-type]
    bridge = Bridge(Scripted, Letters, model="m")
    server = RouterServer(bridge, behind=Behind(pool))
    await server.serve_here()
    try:
        async with aiohttp.ClientSession() as http:
            yield Front(pool, server.url, http)
    finally:
        await server.aclose()
        await pool.close()


Run = Callable[[Coroutine[Any, Any, None]], None]


def assert_right(body: Any) -> None:
    assert body["output_ids"] == expected_ids(PROMPT)
    assert body["meta_info"]["id"] == "r"
