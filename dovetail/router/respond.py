"""Bodies in, answers out: JSON, server-sent events, errors, and clients that go away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dovetail.router.answer import Answer
from dovetail.router.fields import Fields, RequestError

T = TypeVar("T")

_KINDS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    429: "RateLimitError",
}
CLIENT_GONE = 499
_AT_ONCE_BYTES = 500_000
_MOST = {"values": (b",", 2**23), "lists and objects": (b"[{", 2**20)}
"""Of a body. Nobody else is served while JSON is read, and each of these takes a while, and up to a
hundred times the memory of its bytes. In texts they count too."""
_LARGE = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")


class Json(Response):
    """JSON by orjson: numbers keep every digit, and arrays of numbers are quick."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def failure(error: RequestError) -> Json:
    """An error as all dialects' clients find it, with the field, what came and what is wanted."""
    return Json(failure_body(error), status_code=error.status, headers=failure_headers(error))


def failure_headers(error: RequestError) -> dict[str, str]:
    """What an error's answer says beside its body."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


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
        RequestError: it is no JSON object.
    """
    return await read(request, lambda fields: fields)


async def read(request: Request, reader: Callable[[Fields], T]) -> T:
    """What `reader` makes of a body. Large ones are read one after the other on a thread of their
    own: some take seconds, in which others are served.

    Raises:
        RequestError: the body is no JSON object, or the reader refuses it.
    """
    body = await request.body()
    if len(body) <= _AT_ONCE_BYTES:
        return reader(_fields(body))
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_LARGE, lambda: reader(_fields(body)))


def _fields(body: bytes) -> Fields:
    if not body.strip():
        return Fields({})
    if len(body) > _AT_ONCE_BYTES:
        _check_counts(body)
    try:
        return Fields(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"the body is not JSON: {error}",
            field="body",
            got=repr(body[:40]),
            expected="a JSON object",
        ) from error


def _check_counts(body: bytes) -> None:
    for what, (signs, most) in _MOST.items():
        count = sum(body.count(sign) for sign in signs)
        if count > most:
            raise RequestError(
                f"the body has {count} {what}, expected at most {most}: send it in parts",
                status=413,
                field="body",
                got=f"{count} {what}",
                expected=f"at most {most}",
            )


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
        raise RequestError("the client is gone", status=CLIENT_GONE)
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
