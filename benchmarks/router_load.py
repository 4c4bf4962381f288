"""Clients that ask again as soon as they are answered, with as little work as possible.

    python -m benchmarks.router_load --port 31000 --form generate --clients 32 --seconds 3

Prints one JSON object: requests per second, latencies in milliseconds, how many were answered
(`all`: before measuring began too), and how many failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

import httptools
import orjson
import uvloop

PROMPTS, SIBLINGS = 64, 8
_WARM_S = 0.5


def requests(form: str, port: int) -> list[bytes]:
    """Whole requests: groups of siblings with one prompt, in the order of a rollout."""
    drawn = random.Random(0)
    made = []
    for _ in range(PROMPTS):
        ids = [drawn.randrange(100, 30000) for _ in range(128)]
        for _ in range(SIBLINGS):
            made.append(_request(form, port, ids, len(made)))
    return made


def _request(form: str, port: int, ids: list[int], number: int) -> bytes:
    path, body = "/v1/completions", _completion(ids)
    if form == "generate":
        path, body = "/generate", _generate(ids, number)
    raw = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"accept: */*\r\nuser-agent: load\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def _generate(ids: list[int], number: int) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 32, "sampling_seed": number}
    return {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}


def _completion(ids: list[int]) -> dict[str, Any]:
    words = " ".join(map(str, ids))
    return {"model": "m", "prompt": words, "max_tokens": 32, "temperature": 1.0}


class Client(asyncio.Protocol):
    """One connection that always has one request on it."""

    def __init__(self, load: Load, first: int) -> None:
        self._load, self._next = load, first
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost()

    def on_message_complete(self) -> None:
        """An answer is whole."""
        load = self._load
        load.answered(time.perf_counter() - self._asked, self._parser.get_status_code())
        if load.running:
            if not self._parser.should_keep_alive():
                load.failed += 1
            self._ask()

    def _ask(self) -> None:
        requests = self._load.requests
        self._asked = time.perf_counter()
        self._transport.write(requests[self._next % len(requests)])
        self._next += 1


class Load:
    """All clients and what they saw."""

    def __init__(self, requests: list[bytes]) -> None:
        self.requests = requests
        self.running = True
        self.failed = 0
        self.latencies: list[float] = []

    def answered(self, seconds: float, status: int) -> None:
        """One answer."""
        self.latencies.append(seconds)
        self.failed += status != 200

    def lost(self) -> None:
        """A connection broke."""
        self.failed += self.running


async def measure(port: int, form: str, clients: int, seconds: float) -> dict[str, float]:
    """What `clients` see in so many seconds, after a moment that does not count."""
    load, loop = Load(requests(form, port)), asyncio.get_running_loop()
    for number in range(clients):
        # Neighbours are siblings, as in a rollout.
        await loop.create_connection(lambda number=number: Client(load, number), "127.0.0.1", port)
    await asyncio.sleep(_WARM_S)
    before = len(load.latencies)
    load.latencies.clear()
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    took = time.perf_counter() - started
    load.running = False
    seen = sorted(load.latencies)
    if not seen:
        raise SystemExit("no request was answered")
    part = {name: seen[int(len(seen) * q)] * 1000 for name, q in _QUANTILES.items()}
    counts = {"requests": len(seen), "all": before + len(seen), "failed": load.failed}
    return {"per_s": len(seen) / took, **counts, **part}


_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--form", choices=["generate", "completions"], default="generate")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    print(json.dumps(uvloop.run(measure(given.port, given.form, given.clients, given.seconds))))
