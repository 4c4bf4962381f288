"""A generation server by hand: answers as SGLang and as vLLM do, and notes what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

TOKENS, LOGPROBS = [5, 6, 7], [-0.1, -0.2, -0.3]


class EngineServer:
    """`asked` are (path, body) of every request; `hold` keeps /generate waiting until an abort."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.hold = 0
        self.fail = 0
        self.address = ("127.0.0.1", 0)
        self._aborted = asyncio.Event()

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((request.path, body))
        if self.fail:
            self.fail -= 1
            return web.Response(status=503, text="not yet")
        reason, count = "stop", len(TOKENS)
        if self.hold:
            self.hold -= 1
            await self._aborted.wait()
            reason, count = "abort", 1
        pairs = list(zip(LOGPROBS[:count], TOKENS[:count], [None] * count, strict=True))
        meta = {
            "output_token_logprobs": pairs,
            "finish_reason": {"type": reason},
            "weight_version": "3",
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": count,
            "cached_tokens": 0,
        }
        return web.json_response({"text": "abc"[:count], "meta_info": meta})

    async def vllm(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((request.path, body))
        content = [{"logprob": logprob} for logprob in LOGPROBS]
        choice = {"token_ids": TOKENS, "logprobs": {"content": content}, "finish_reason": "length"}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 2}})

    async def workers(self, request: web.Request) -> web.Response:
        host, port = self.address
        return web.json_response({"workers": [{"url": f"http://{host}:{port}", "id": "0"}]})

    async def abort(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, await request.json()))
        self._aborted.set()
        return web.json_response({})

    async def text(self, request: web.Request) -> web.Response:
        return web.Response(text="no json")


@asynccontextmanager
async def serving() -> AsyncIterator[EngineServer]:
    """A server on a free port of this machine."""
    server, app = EngineServer(), web.Application()
    app.router.add_post("/generate", server.generate)
    app.router.add_post("/inference/v1/generate", server.vllm)
    app.router.add_get("/workers", server.workers)
    app.router.add_post("/abort_request", server.abort)
    app.router.add_get("/text", server.text)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.address = runner.addresses[0][:2]
    try:
        yield server
    finally:
        server._aborted.set()
        await runner.cleanup()
