"""What can go wrong on the way to a server, each as the error that a pool acts on."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.types import EngineError
from dovetail.types.errors import EngineBusyError, EngineGoneError

TOKEN = "sesame-and-other-seeds"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[HttpClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    client = HttpClient(f"http://{host}:{port}", TOKEN, timeout_s=10)
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


def answering(**kwargs: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(**kwargs)

    return handler


def posting(handler: Handler, timeout_s: float = 10.0) -> Any:
    async def main() -> Any:
        async with served(handler) as client:
            return await client.post("/generate", {"a": 1}, timeout_s=timeout_s)

    return asyncio.run(main())


def streaming(handler: Handler) -> list[Any]:
    async def main() -> list[Any]:
        async with served(handler) as client:
            return [event async for event in client.stream("/generate", {"a": 1})]

    return asyncio.run(main())


def sending(*pieces: bytes, cut: bool = False) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0)
        if cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handler


def test_a_request_brings_its_body_as_json_and_the_token() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        said = {"method": request.method, "body": await request.json(), **request.headers}
        return web.json_response(said)

    answer = posting(handler)
    assert answer["method"] == "POST" and answer["body"] == {"a": 1}
    assert answer["Authorization"] == f"Bearer {TOKEN}"
    assert answer["Content-Type"] == "application/json"


def test_an_empty_answer_is_an_empty_object_and_words_are_told_as_words() -> None:
    assert posting(answering(status=200)) == {}

    async def main() -> str:
        async with served(answering(text="Cache flushed.\n")) as client:
            return await client.tell("/flush_cache", method="GET")

    assert asyncio.run(main()) == "Cache flushed.\n"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "too long by 3"}}',
        b'{"object": "error", "message": "too long by 3", "code": 400}',
        b'{"detail": "too long by 3"}',
        b'{"error": "too long by 3"}',
        b"too long by 3",
    ],
)
def test_a_refusal_has_the_servers_own_words_and_status(body: bytes) -> None:
    with pytest.raises(EngineRefusedError, match=r"/generate\) .*status 400: too long by 3") as got:
        posting(answering(status=400, body=body))
    assert got.value.status == 400 and got.value.said == "too long by 3"
    assert not isinstance(got.value, EngineGoneError)
    back = pickle.loads(pickle.dumps(got.value))
    assert (str(back), back.status) == (str(got.value), 400)


def test_the_token_is_in_no_message() -> None:
    for status in (400, 429, 500):
        with pytest.raises(EngineError) as got:
            posting(answering(status=status, text=f"not with {TOKEN}"))
        assert TOKEN not in str(got.value) and "not with ***" in str(got.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_says_when_to_come_back(status: int) -> None:
    with pytest.raises(EngineBusyError) as got:
        posting(answering(status=status, text="full", headers={"Retry-After": "2.5"}))
    assert got.value.retry_after_s == 2.5


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_failure_without_json_means_that_the_engine_is_gone(status: int) -> None:
    with pytest.raises(EngineGoneError, match=f"status {status}"):
        posting(answering(status=status, text="Internal Server Error"))


def test_a_failure_that_the_engine_explains_is_its_own() -> None:
    with pytest.raises(EngineRefusedError, match="no such layer"):
        posting(answering(status=500, text='{"error": {"message": "no such layer"}}'))


def test_a_redirect_is_not_followed() -> None:
    with pytest.raises(EngineError, match="status 307"):
        posting(answering(status=307, headers={"Location": "http://127.0.0.1:9/"}))


@pytest.mark.parametrize("body", [b"<html>", b'{"text": "ab', b"\xff\xfe\x00"])
def test_garbage_means_that_the_engine_is_gone(body: bytes) -> None:
    with pytest.raises(EngineGoneError, match="not JSON"):
        posting(answering(body=body))


def test_numbers_that_are_none_are_for_the_caller_to_refuse() -> None:
    found = posting(answering(body=b'{"a": NaN, "b": -Infinity}'))
    assert found["a"] != found["a"] and found["b"] == float("-inf")


def test_a_server_that_is_not_there_is_gone() -> None:
    async def main() -> None:
        async with served(answering()) as client:
            gone = HttpClient("http://127.0.0.1:1")
            with pytest.raises(EngineGoneError, match=r"http://127\.0\.0\.1:1 .*can't be reached"):
                await gone.get("/health")
            await gone.close()
            assert await client.get("/health") == {}

    asyncio.run(main())


def test_a_server_that_takes_too_long_is_gone() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    with pytest.raises(EngineGoneError, match=r"no answer within 0\.1 s"):
        posting(handler, timeout_s=0.1)


def test_a_connection_that_breaks_means_that_the_engine_is_gone() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"text": ')
        assert request.transport is not None
        request.transport.abort()
        return response

    with pytest.raises(EngineGoneError, match="broke off"):
        posting(handler)


def test_a_client_works_on_one_loop_after_another() -> None:
    client = HttpClient("http://127.0.0.1:1")
    for _ in range(2):
        with pytest.raises(EngineGoneError):
            asyncio.run(client.get("/"))
    asyncio.run(client.close())


def test_a_stream_gives_its_events_however_they_are_cut() -> None:
    text = "x" * 300_000
    whole = b'data: {"n": 1}\n\n: a comment\n\ndata: {"text": "%s"}\n\ndata: [DONE]\n\n' % (
        text.encode()
    )
    pieces = [whole[at : at + 7919] for at in range(0, len(whole), 7919)]
    assert streaming(sending(*pieces)) == [{"n": 1}, {"text": text}]


def test_a_stream_that_ends_early_means_that_the_engine_is_gone() -> None:
    for cut in (False, True):
        with pytest.raises(EngineGoneError, match="broke off"):
            streaming(sending(b'data: {"n": 1}\n\n', cut=cut))


def test_a_stream_that_fails_says_why() -> None:
    with pytest.raises(EngineRefusedError, match="out of pages"):
        streaming(sending(b'data: {"error": {"message": "out of pages"}}\n\n'))
    with pytest.raises(EngineRefusedError, match="status 400: no such field"):
        streaming(answering(status=400, text='{"message": "no such field"}'))


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: [1]\n\n"])
def test_garbage_in_a_stream_means_that_the_engine_is_gone(event: bytes) -> None:
    with pytest.raises(EngineGoneError):
        streaming(sending(event))
