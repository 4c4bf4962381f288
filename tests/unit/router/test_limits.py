"""Bodies, heads, connections and times are bounded, and the loop lives on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from dovetail.router.bridge import Bridge
from dovetail.router.limits import Limits
from dovetail.router.server import RouterServer
from dovetail.types import EngineBusyError, EngineGoneError, EngineTimeoutError
from tests.unit.router.scripted import Client, Letters, Scripted, serving

BODY = {"text": "hi", "sampling_params": {"max_new_tokens": 2}}


def _run(
    work: Callable[[Client], Awaitable[Any]], engine: Scripted | None = None, **limits: Any
) -> Any:
    async def inside() -> Any:
        async with serving(engine or Scripted(), limits=Limits(**limits)) as client:
            found = await work(client)
            # Whatever happened, others are served.
            assert (await client.post("/generate", BODY))[0] in (200, 429, 500, 503, 504)
            return found

    return asyncio.run(inside())


async def _raw(server: RouterServer, *pieces: bytes, pause_s: float = 0.0) -> tuple[int, Any]:
    """Status and JSON of what is answered to these bytes; 0: closed without an answer."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        for piece in pieces:
            writer.write(piece)
            try:
                await writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(pause_s)
        answer = await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)) if head else (0, None)


def _head(*lines: str) -> bytes:
    return "\r\n".join(["POST /generate HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def test_a_body_that_is_announced_as_too_large_is_refused_at_once() -> None:
    async def work(client: Client) -> tuple[int, Any]:
        return await _raw(client.server, _head("Content-Length: 1001"))

    status, content = _run(work, body_bytes=1000)
    assert status == 413
    assert "1001 bytes, expected at most 1000 (--router-max-body-mb" in content["message"]


def test_a_body_that_grows_too_large_is_refused_while_it_comes() -> None:
    chunk = b"fff\r\n" + b"x" * 0xFFF + b"\r\n"

    async def work(client: Client) -> tuple[int, Any]:
        return await _raw(client.server, _head("Transfer-Encoding: chunked"), *[chunk] * 500)

    status, content = _run(work, body_bytes=100_000)
    assert status == 413
    assert content["error"]["param"] == "body"


def test_a_client_that_sends_too_much_still_reads_why() -> None:
    async def work(client: Client) -> tuple[int, Any]:
        return await client.post("/generate", {"text": "x" * 30_000_000})

    assert _run(work, body_bytes=1_000_000)[0] == 413


def test_bodies_of_all_requests_together_are_bounded() -> None:
    async def work(client: Client) -> list[int]:
        half = _head("Content-Length: 1000") + b"x" * 999
        writers = []
        for _ in range(8):
            _, writer = await asyncio.open_connection(client.server.host, client.server.port)
            writer.write(half)
            writers.append(writer)
        await asyncio.sleep(0.3)
        answers = [await client.post("/generate", {"text": "y" * 900}) for _ in range(2)]
        for writer in writers:
            writer.close()
        while True:
            status, _ = await client.post("/generate", BODY)
            if status == 200:
                return [got for got, _ in answers]
            await asyncio.sleep(0.01)

    assert _run(work, body_bytes=1000) == [503, 503]


@pytest.mark.parametrize(
    ("pieces", "part"),
    [
        ([b"POST /generate HTTP/1.1\r\nHost: local"], "head"),
        ([b"POST /generate HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 50], "head"),
        ([_head("Content-Length: 100"), *[b"x"] * 50], "body"),
    ],
)
def test_a_client_that_sends_too_slowly_is_told_and_dropped(pieces: list[bytes], part: str) -> None:
    async def work(client: Client) -> tuple[int, Any]:
        return await _raw(client.server, *pieces, pause_s=0.02)

    status, content = _run(work, head_s=0.3, body_s=0.1)
    assert status == 408
    assert content["error"]["param"] == part


def test_a_connection_without_a_request_is_closed() -> None:
    async def work(client: Client) -> tuple[int, Any]:
        return await _raw(client.server)

    assert _run(work, head_s=0.2) == (0, None)


def test_many_slow_clients_hold_nobody_up() -> None:
    async def work(client: Client) -> tuple[float, int]:
        async def slow() -> int:
            return (await _raw(client.server, _head("Content-Length: 9"), b"x"))[0]

        waiting = [asyncio.ensure_future(slow()) for _ in range(200)]
        await asyncio.sleep(0.1)
        started = time.perf_counter()
        await client.ok("/generate", BODY)
        took = time.perf_counter() - started
        return took, (await asyncio.gather(*waiting)).count(408)

    took, refused = _run(work, head_s=1.0, body_s=0.5)
    assert refused == 200
    assert took < 5


@pytest.mark.parametrize(
    "pieces",
    [
        [b"POST /generate HTTP/1.1\r\nX-A: " + b"a" * 2_000_000],
        [b"GET /" + b"a" * 2_000_000],
        [b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 200_000],
    ],
)
def test_a_head_without_end_is_refused(pieces: list[bytes]) -> None:
    async def work(client: Client) -> tuple[int, Any]:
        return await _raw(client.server, *pieces)

    assert _run(work)[0] in (400, 431)


def test_trailers_without_end_are_refused() -> None:
    async def work(client: Client) -> tuple[int, Any]:
        start = _head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n"
        return await _raw(client.server, start, *[b"X-A: b\r\n" * 1000] * 100)

    assert _run(work)[0] in (400, 431)


@pytest.mark.parametrize(
    "data", [b"\x00\xff\x16\x03\x01", b"GET\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_gets_an_error_in_the_form_of_all_errors(data: bytes) -> None:
    async def work(client: Client) -> tuple[int, Any]:
        return await _raw(client.server, data)

    status, content = _run(work)
    assert status == 400
    assert content["object"] == "error"


def test_connections_over_the_limit_are_told_to_come_later() -> None:
    async def work(client: Client) -> int:
        await client.ok("/generate", BODY)
        held = [
            await asyncio.open_connection(client.server.host, client.server.port) for _ in range(4)
        ]
        status, content = await _raw(client.server)
        assert "come later" in content["message"]
        for _, writer in held:
            writer.close()
        return status

    assert _run(work, connections=5) == 503


def test_a_request_that_takes_too_long_ends() -> None:
    engine = Scripted()

    async def work(client: Client) -> tuple[int, Any]:
        engine.held = asyncio.Event()
        found = await client.post("/generate", BODY)
        engine.held.set()
        return found

    status, content = _run(work, engine, request_s=0.3)
    assert status == 504
    assert "--router-request-timeout-s" in content["message"]
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (EngineBusyError("full", 2.5), 429, "3"),
        (EngineGoneError("dead"), 503, "1"),
        (EngineTimeoutError("late"), 504, None),
    ],
)
def test_an_engine_that_has_no_place_says_when_to_come_again(
    error: Exception, status: int, retry: str | None
) -> None:
    engine = Scripted()

    async def work(client: Client) -> tuple[int, str | None]:
        engine.failure = error
        url = f"{client.server.url}/generate"
        async with client.session.post(url, json=BODY) as answer:
            return answer.status, answer.headers.get("Retry-After")

    assert _run(work, engine) == (status, retry)


def test_a_connection_is_kept_between_requests() -> None:
    async def work(client: Client) -> int:
        body = json.dumps(BODY).encode()
        whole = _head(f"Content-Length: {len(body)}") + body
        reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
        statuses = []
        for _ in range(3):
            writer.write(whole)
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(
                int(one[16:]) for one in head.split(b"\r\n") if one[:14] == b"content-length"
            )
            await reader.readexactly(size)
            statuses.append(int(head.split()[1]))
            # Longer than a head may take: between requests another clock runs.
            await asyncio.sleep(0.3)
        writer.close()
        return statuses.count(200)

    assert _run(work, head_s=0.2) == 3


def test_a_server_lives_on_a_loop_that_runs_already_with_nothing_to_cross() -> None:
    engine = Scripted()

    async def work() -> tuple[Any, tuple[int, Any]]:
        bridge = Bridge(lambda: engine, Letters, model="some/model")
        server = RouterServer(bridge)
        await server.serve_here()
        async with aiohttp.ClientSession() as session:
            client = Client(server, session)
            first = await client.ok("/generate", BODY)
            engine.held = asyncio.Event()
            waiting = asyncio.ensure_future(client.post("/generate", BODY))
            await client.until(1)
            await server.aclose()
            return first, await waiting

    first, last = asyncio.run(work())
    assert first["text"] == "ab"
    assert last[0] == 503
    assert "the run ended meanwhile" in last[1]["message"]
    assert len(engine.cancelled) == 1
