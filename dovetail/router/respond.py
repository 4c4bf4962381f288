"""Bodies in, answers out: JSON, server-sent events, errors, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dovetail.router.answer import Answer
from dovetail.router.fields import Fields, RequestError

T = TypeVar("T")

MOST_BODY_BYTES = 64 * 2**20
_KINDS = {400: "BadRequestError", 404: "NotFoundError", 413: "BadRequestError"}
_CLIENT_GONE = 499


class Json(Response):
    """JSON by orjson: numbers keep every digit, and arrays of numbers are quick."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def failure(error: RequestError) -> Json:
    """An error as all dialects' clients find it, with the field, what came and what is wanted."""
    return Json(failure_body(error), status_code=error.status)


def failure_body(error: RequestError) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = _KINDS.get(error.status, "ServerError" if error.status >= 500 else "BadRequestError")
    return {
        "object": "error",
        "message": str(error),
        "error": {
            "message": str(error),
            "type": kind,
            "code": error.status,
            "param": error.field,
            "got": error.got,
            "expected": error.expected,
        },
    }


async def fields_of(request: Request) -> Fields:
    """The JSON object of a body; no body counts as an empty one.

    Raises:
        RequestError: it is too large, or no JSON object.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY_BYTES:
            raise RequestError(
                f"the body has more than {MOST_BODY_BYTES} bytes",
                status=413,
                field="body",
                got=f"more than {MOST_BODY_BYTES} bytes",
                expected=f"at most {MOST_BODY_BYTES} bytes",
            )
    if not body.strip():
        return Fields({})
    try:
        return Fields(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"the body is not JSON: {error}",
            field="body",
            got=repr(bytes(body[:40])),
            expected="a JSON object",
        ) from error


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first.

    Raises:
        RequestError: the client is gone; nobody reads this.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([doing, leaving], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise RequestError("the client is gone", status=_CLIENT_GONE)
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[Answer]]) -> AsyncIterator[tuple[int, Answer]]:
    """What several streams give, with the number of the stream, as it comes."""
    queue: asyncio.Queue[tuple[int, Answer | None]] = asyncio.Queue()

    async def drain(number: int, stream: AsyncIterator[Answer]) -> None:
        try:
            async for answer in stream:
                queue.put_nowait((number, answer))
        finally:
            queue.put_nowait((number, None))

    tasks = [asyncio.ensure_future(drain(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, answer = await queue.get()
            if answer is not None:
                yield number, answer
                continue
            running -= 1
            await tasks[number]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def events(chunks: AsyncIterator[Any]) -> StreamingResponse:
    """Server-sent events of JSON objects, ended by [DONE]; a failure under way is one of them."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield b"data: " + orjson.dumps(chunk, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n\n"
        except RequestError as error:
            yield b"data: " + orjson.dumps(failure_body(error)) + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
