"""HTTP/1.1 to one engine with as little as possible between the bytes: kept connections, answers as
they are.

A client library takes some 200 us per request, which is more than half of what the proxy takes in
all, and it takes bytes that come after an answer for the start of the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from dovetail.types.errors import EngineGoneError

CONNECT_S = 10.0
MOST_WHOLE = 4 * 2**20
"""An answer of up to so many bytes is taken whole before any of it is passed on: while nothing was
passed on, another engine can make it anew."""
_MOST_UNREAD = 2**18
_MOST_KEPT = 512
_STREAM = b"text/event-stream"

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Reply:
    """The head of an answer, and all of the body where it was taken whole."""

    status: int
    headers: Headers
    body: bytes | None
    """None: it comes in chunks."""
    connection: Connection | None = None
    events: bool = False
    """The body is server-sent events."""

    async def chunk(self) -> bytes:
        """The next part of the body; empty at its end.

        Raises:
            EngineGoneError: it broke off.
        """
        return b"" if self.connection is None else await self.connection.chunk()

    def close(self) -> None:
        """Nobody wants the rest of it."""
        if self.connection is not None and self.connection.busy:
            self.connection.close()

    def distrust(self) -> None:
        """It is no answer to what was asked: what else comes from there is none either."""
        if self.connection is not None:
            self.connection.close()


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport | None = None
        self.alive = False
        self.used = False
        """It has answered before: it may have been closed by the engine in the meantime."""
        self.busy = False
        """A request is on it whose answer was not taken to its end."""
        self._waiter: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.begun = False
        """Something of the answer came."""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._size = 0
        self._status = 0
        self._events = self._streaming = self._complete = self._held = self._lasting = False
        self._until_close = True
        self._error: EngineGoneError | None = None

    # A request and its answer

    async def ask(self, request: Sequence[bytes]) -> Reply:
        """Send a request, and wait for its answer, or the head of it where it is long.

        Raises:
            EngineGoneError: the connection broke, or what came is no HTTP.
        """
        assert self._transport is not None, "asked once it is made"
        self.busy = True
        self._transport.writelines(request)
        while not self._streaming and not self._complete:
            await self._more()
        if self._complete:
            body = b"".join(self._body)
            self._finish()
            return Reply(self._status, self._headers, body, self)
        return Reply(self._status, self._headers, None, self, self._events)

    async def chunk(self) -> bytes:
        """As `Reply.chunk`."""
        while not self._body and not self._complete:
            await self._more()
        body = b"".join(self._body)
        self._body.clear()
        self._size = 0
        if self._held and self._transport is not None:
            self._held = False
            self._transport.resume_reading()
        if self._complete and not body:
            self._finish()
        return body

    def close(self) -> None:
        """Break it. An engine with a request on it sees that its client is gone."""
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _finish(self) -> None:
        """The whole answer was taken."""
        self.busy = False
        self.used = True
        if self.alive and self._error is None and self._lasting:
            self._upstream.keep(self)
        else:
            self.close()

    def renew(self) -> None:
        """Ready for the next request."""
        self._reset()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport, self.alive = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        if not self.busy or self._complete:
            # An answer that nobody asked for: it must not be taken for that of the next request.
            self._break("it sent more than an answer")
            return
        self.begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(f"what it sent is no HTTP: {error}")
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self._upstream.drop(self)
        if self.busy and not self._complete:
            if self._status and self._until_close and exc is None:
                self._complete = True
            else:
                self._break(f"it closed the connection{'' if exc is None else f': {exc}'}")
        self._wake()

    # httptools

    def on_message_begin(self) -> None:
        """Of an answer, or of one too many."""
        if self._complete:
            self._break("it sent more than an answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if self._complete:
            return
        name = name.lower()
        if name == b"content-length" or name == b"transfer-encoding":
            self._until_close = False
        elif name == b"content-type":
            self._events = self._streaming = value.startswith(_STREAM)
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Those of an answer, or of a word in advance (1xx)."""
        status = self._parser.get_status_code()
        if self._complete:
            return
        if status < 200:
            self._headers = []
        else:
            self._status = status

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._complete:
            return
        self._body.append(body)
        self._size += len(body)
        if self._size > MOST_WHOLE:
            self._streaming = True
        if self._streaming and self._size > _MOST_UNREAD and not self._held:
            assert self._transport is not None, "it gave the data"
            self._held = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The end of an answer, or of a word in advance."""
        if self._status and not self._complete:
            self._complete = True
            # The parser knows it at this moment only.
            self._lasting = self._parser.should_keep_alive()

    def _break(self, what: str) -> None:
        if self._error is None:
            self._error = EngineGoneError(f"{self._upstream.url}: {what}")
        if self.alive:
            self.close()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._complete or (self._streaming and (self._body or self._status)):
            waiter.set_result(None)
        elif self._error is not None:
            waiter.set_exception(self._error)


class Upstream:
    """Connections to one engine, kept for the next request."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._secure else 80)
        self.host_header = parts.netloc.rpartition("@")[2].encode()
        self._kept: list[Connection] = []
        self._open: set[Connection] = set()
        self._closed = False

    async def ask(self, request: Sequence[bytes]) -> Reply:
        """The answer to a request.

        Raises:
            EngineGoneError: the engine can't be reached, or broke off.
        """
        while True:
            connection = self._kept.pop() if self._kept else await self._connect()
            if not connection.alive:
                continue
            used = connection.used
            connection.renew()
            try:
                return await connection.ask(request)
            except EngineGoneError:
                # The engine may close a kept connection at any time, also when a request is on its
                # way already: that says nothing about the engine.
                if not used or connection.begun:
                    raise
            except BaseException:
                connection.close()
                raise

    def keep(self, connection: Connection) -> None:
        """For the next request."""
        if self._closed or len(self._kept) >= _MOST_KEPT:
            connection.close()
        else:
            self._kept.append(connection)

    def drop(self, connection: Connection) -> None:
        """It is closed."""
        self._open.discard(connection)
        if connection in self._kept:
            self._kept.remove(connection)

    def close(self) -> None:
        """Break every connection."""
        self._closed = True
        for connection in list(self._open):
            connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=self._secure or None
                )
        except (OSError, TimeoutError) as error:
            raise EngineGoneError(f"{self.url} can't be reached: {error}") from error
        self._open.add(connection)
        return connection
