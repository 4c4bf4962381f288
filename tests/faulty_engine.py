"""An engine server that fails on purpose: in SGLang's or vLLM's form, with faults that are scripted
or drawn from a seed, and counts of every fault that fired.

    async with FaultyEngine("sglang", script=[Fault.DROP, Fault.NONE]) as engine:
        ...  # engine.url, engine.fired, engine.answered

    python tests/faulty_engine.py --dialect sglang --port 30000 --seed 7 --rate drop=0.1

What it answers depends on the prompt alone (`expected_ids`), so that a test sees at once when an
answer went to the wrong request. It speaks HTTP by hand: no library would let it break the rules.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

TOKENS = 6


class Fault(StrEnum):
    """What becomes of one request."""

    NONE = "none"
    DELAY = "delay"
    """The answer comes late."""
    HANG = "hang"
    """No answer, the connection stays open."""
    DROP = "drop"
    """The connection is reset without an answer."""
    ERROR = "error"
    """Status 500 without JSON."""
    REFUSE = "refuse"
    """Status 400 with a message: asking another engine is of no use."""
    BUSY = "busy"
    """Status 503 with Retry-After."""
    GARBAGE = "garbage"
    """What comes is no HTTP."""
    BAD_JSON = "bad_json"
    """A whole answer, whose JSON ends in the middle."""
    SHORT = "short"
    """The body ends before its announced length."""
    DIE_MID_STREAM = "die_mid_stream"
    """A stream breaks off after its first event; a body without a stream after half."""
    DUPLICATE = "duplicate"
    """The answer comes twice."""
    LATE_DUPLICATE = "late_duplicate"
    """The answer comes again a moment after it came."""
    OLD_WEIGHTS = "old_weights"
    """The answer is of older weights than it was given."""


def expected_ids(prompt: Sequence[int]) -> list[int]:
    """What every engine without a fault answers to these token ids."""
    start = sum((i + 1) * token for i, token in enumerate(prompt))
    return [(start + i * i) % 251 for i in range(TOKENS)]


@dataclass
class FaultyEngine:
    """A server on the running loop."""

    dialect: str = "sglang"
    script: list[Fault] = field(default_factory=list)
    """Faults of the first requests, one each."""
    rates: Mapping[Fault, float] = field(default_factory=dict)
    """Of later ones: how likely each fault is."""
    seed: int = 0
    delay_s: float = 0.05
    tick_s: float = 0.0
    """Between two events of a stream, and before an answer."""
    port: int = 0
    weight_version: int | None = None
    fired: Counter[Fault] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    left: int = 0
    """Clients that went away before their answer."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paused: bool = False

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """`http://127.0.0.1:port`."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after `stop` again on the same port."""
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", self.port, limit=2**28, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Die: reset every connection, and free the port."""
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        _, path, _ = head[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = path.partition("?")[0]
        self.paths[path] += 1
        request = json.loads(body) if body else {}
        if path not in _GENERATE:
            writer.write(_whole(self._control(path, request)))
            return True
        self.requests.append(request)
        self.headers.append(headers)
        leaving = asyncio.ensure_future(reader.read(1))
        answering = asyncio.ensure_future(self._answer(path, request, writer))
        try:
            await asyncio.wait([leaving, answering], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.left += 1
                return False
            return answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await leaving

    def _fault(self) -> Fault:
        if self.script:
            return self.script.pop(0)
        drawn, upto = self._random.random(), 0.0
        for fault, rate in self.rates.items():
            upto += rate
            if drawn < upto:
                return fault
        return Fault.NONE

    async def _answer(
        self, path: str, request: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection stays open."""
        fault = self._fault()
        self.fired[fault] += 1
        if fault is Fault.HANG:
            await asyncio.Event().wait()
        if fault is Fault.DROP:
            writer.transport.abort()
            return False
        if fault is Fault.DELAY:
            await asyncio.sleep(self.delay_s)
        if fault in _REPLIES:
            writer.write(_REPLIES[fault])
            return fault is not Fault.GARBAGE
        if self.tick_s:
            await asyncio.sleep(self.tick_s)
        version = self.weight_version
        if fault is Fault.OLD_WEIGHTS and version is not None:
            version -= 1
        if request.get("stream"):
            return await self._stream(path, request, fault, version, writer)
        raw = json.dumps(_body(path, request, TOKENS, version)).encode()
        return await self._whole(raw, fault, writer)

    async def _whole(self, raw: bytes, fault: Fault, writer: asyncio.StreamWriter) -> bool:
        if fault in (Fault.SHORT, Fault.DIE_MID_STREAM):
            writer.write(_head(len(raw)) + raw[: len(raw) // 2])
            await writer.drain()
            writer.close()
            return False
        if fault is Fault.BAD_JSON:
            raw = raw[: len(raw) // 2]
        answer = _head(len(raw)) + raw
        writer.write(answer * 2 if fault is Fault.DUPLICATE else answer)
        self.answered += fault is not Fault.BAD_JSON
        if fault is Fault.LATE_DUPLICATE:
            # Before the next request of this connection is read.
            await asyncio.sleep(0.02)
            writer.write(answer)
        return True

    async def _stream(
        self,
        path: str,
        request: dict[str, Any],
        fault: Fault,
        version: int | None,
        writer: asyncio.StreamWriter,
    ) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for count in range(1, TOKENS + 1):
            event = b"data: " + json.dumps(_body(path, request, count, version)).encode()
            if fault is Fault.DIE_MID_STREAM and count == 2:
                # In the middle of an event.
                writer.write(_chunk(event[: len(event) // 2]))
                await writer.drain()
                writer.transport.abort()
                return False
            writer.write(_chunk(event + b"\n\n"))
            await writer.drain()
            await asyncio.sleep(self.tick_s)
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self.answered += 1
        return True

    def _control(self, path: str, request: dict[str, Any]) -> bytes:
        if path.startswith("/update_weights") and request.get("weight_version") is not None:
            self.weight_version = int(request["weight_version"])
        if path in ("/pause_generation", "/pause"):
            self.paused = True
        if path in ("/continue_generation", "/resume"):
            self.paused = False
        said = {"success": True, "message": "", "weight_version": str(self.weight_version)}
        return json.dumps(said).encode()


_GENERATE = ("/generate", "/inference/v1/generate", "/v1/completions", "/v1/chat/completions")


def _head(length: int, status: str = "200 OK", more: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{more}"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def _whole(raw: bytes) -> bytes:
    return _head(len(raw)) + raw


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_REPLIES = {
    Fault.ERROR: b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/plain\r\n"
    b"content-length: 4\r\n\r\nboom",
    Fault.REFUSE: _head(40, "400 Bad Request") + b'{"error":{"message":"no such sampling"}}',
    Fault.BUSY: _head(2, "503 Service Unavailable", "retry-after: 0\r\n") + b"{}",
    Fault.GARBAGE: b"\x00\xffno http at all\r\n\r\n",
}


def _body(path: str, request: dict[str, Any], count: int, version: int | None) -> dict[str, Any]:
    """The first `count` tokens of the answer."""
    prompt = request.get("input_ids") or request.get("token_ids") or request.get("prompt") or []
    prompt = prompt if isinstance(prompt, list) else [ord(c) for c in str(prompt)]
    ids = expected_ids(prompt)[:count]
    ended = count == TOKENS
    if path == "/generate":
        return {
            "text": "".join(chr(97 + i % 26) for i in ids),
            "output_ids": ids,
            "meta_info": {
                "id": request.get("rid"),
                "finish_reason": {"type": "length", "length": count} if ended else None,
                "prompt_tokens": len(prompt),
                "completion_tokens": count,
                "cached_tokens": 0,
                "weight_version": "default" if version is None else str(version),
                "output_token_logprobs": [[-i / 8, token, None] for i, token in enumerate(ids)],
            },
        }
    choice = {
        "index": 0,
        "token_ids": ids,
        "logprobs": {"content": [{"token": f"token_id:{i}", "logprob": -1.0} for i in ids]},
        "finish_reason": "length" if ended else None,
    }
    return {
        "id": request.get("request_id"),
        "created": int(time.time()),
        "choices": [choice],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": count},
    }


async def _main(arguments: argparse.Namespace) -> None:
    rates = {Fault(name): float(rate) for name, _, rate in arguments.rate}
    engine = FaultyEngine(arguments.dialect, rates=rates, seed=arguments.seed, port=arguments.port)
    async with engine:
        print(engine.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialect", default="sglang", choices=["sglang", "vllm"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rate", action="append", default=[], type=lambda text: text.partition("=")
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(parser.parse_args()))
