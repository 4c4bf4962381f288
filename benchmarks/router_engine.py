"""An engine that answers at once, or after a set time: what routers are measured in front of.

    python -m benchmarks.router_engine --port 31000 [--delay-ms 50]

One process, one event loop, HTTP by httptools: it takes tens of microseconds per request, so that
what is measured is the router.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import httptools
import orjson
import uvloop

TOKENS = 32
_TEXT = "all work and no play makes an engine dull " * 3


def _answers() -> dict[bytes, tuple[bytes, bytes]]:
    """Path -> what stands before and behind the name of the request."""
    ids = list(range(100, 100 + TOKENS))
    usage = {"prompt_tokens": 128, "completion_tokens": TOKENS, "total_tokens": 128 + TOKENS}
    generate: dict[str, Any] = {
        "text": _TEXT,
        "output_ids": ids,
        "meta_info": {
            "id": "@",
            "finish_reason": {"type": "length", "length": TOKENS},
            "prompt_tokens": 128,
            "completion_tokens": TOKENS,
            "cached_tokens": 0,
            "weight_version": "1",
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
        },
    }
    choice = {"index": 0, "text": _TEXT, "logprobs": None, "finish_reason": "length"}
    completion = {"id": "@", "object": "text_completion", "created": 0, "model": "m"}
    completion |= {"choices": [choice], "usage": usage}
    answers = {b"/generate": generate, b"/v1/completions": completion}
    return {path: _halves(answer) for path, answer in answers.items()}


def _halves(answer: dict[str, Any]) -> tuple[bytes, bytes]:
    before, _, behind = orjson.dumps(answer).partition(b"@")
    return before, behind


_ANSWERS = _answers()
_FACTS = orjson.dumps(
    {
        "data": [{"id": "m", "object": "model"}],
        "object": "list",
        "model_path": "m",
        "served_model_name": "m",
        "is_generation": True,
        "weight_version": "1",
        "status": "ok",
        "version": "0",
        "success": True,
    }
)
_RID = b'"rid":"'


class EngineProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._path = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            # A router that would like HTTP/2 better.
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        """The request's target."""
        self._path = url.partition(b"?")[0]

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        body, self._body = b"".join(self._body), []
        halves = _ANSWERS.get(self._path)
        if halves is None:
            self._write(_FACTS)
            return
        at = body.find(_RID)
        rid = body[at + len(_RID) : body.find(b'"', at + len(_RID))] if at >= 0 else b"x"
        raw = halves[0] + rid + halves[1]
        if self._delay_s:
            self._loop.call_later(self._delay_s, self._write, raw)
        else:
            self._write(raw)

    def _write(self, raw: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(raw) + raw)


async def serve(port: int, delay_s: float) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: EngineProtocol(delay_s), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.delay_ms / 1000))
