"""A connection that can't hold the server's memory or places: heads and bodies are bounded, in
bytes and in time.

    connection, or the answer before -- head_s --> head -- body_s + size/rate --> body --> answer

uvicorn has no such bounds. Who breaks one is answered here in the form of every error, and what
still comes is read and dropped for a moment: a client cut off while it sends never sees why.
"""

from __future__ import annotations

import asyncio
import enum
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dovetail.router.fields import RequestError
from dovetail.router.limits import Limits, too_large
from dovetail.router.respond import failure_body, failure_headers

_LINGER_S = 2.0
_LINGER_BYTES = 2**28


class _Part(enum.Enum):
    """Which part of a request comes next."""

    NONE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 by httptools, within limits."""

    def __init__(self, limits: Limits, **settings: Any) -> None:
        super().__init__(**settings)
        self._limits = limits
        self._part = _Part.NONE
        self._refused = False
        self._unread = 0
        """Bytes since the last that were of use."""
        self._body_bytes = 0
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Every place may be taken."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.connections:
            transport.close()
        elif len(self.connections) > self._limits.connections:
            message = f"all {self._limits.connections} connections are taken: come later"
            self._refuse(RequestError(message, status=503, retry_after_s=1.0))
        else:
            self._began = self.loop.time()
            self._look_later(self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Also tells the request that is being answered, where the client sent further ones behind
        it: uvicorn tells the last. And ends uvicorn's timer for the next request, which would keep
        a connection that was reset in memory until then."""
        self._stop_timer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Counts what the parser makes nothing of."""
        self._unread += len(data)
        if self._refused:
            if self._unread > _LINGER_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        if self._refused:
            return
        if self._unread > self._limits.head_bytes and self._part is not _Part.NONE:
            message = f"the head has more than {self._limits.head_bytes} bytes"
            self._refuse(RequestError(message, status=431, field="headers"))
        elif self._part is not _Part.NONE and self._timer is None:
            self._look_later(self._time_left())
        elif self._part is _Part.NONE:
            self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(RequestError(msg, status=400))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part, self._began, self._body_bytes = _Part.HEAD, self.loop.time(), 0

    def on_headers_complete(self) -> None:
        """A body that is announced as too large is not waited for."""
        if self._refused:
            return
        for name, value in self.headers:
            if name == b"content-length" and int(value) > self._limits.body_bytes:
                self._refuse(too_large(self._limits, value.decode()))
                return
        self._part, self._unread = _Part.BODY, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._unread = 0
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._refuse(too_large(self._limits, f"more than {self._limits.body_bytes}"))
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._part, self._unread = _Part.NONE, 0
        super().on_message_complete()

    def _time_left(self) -> float:
        limits, spent = self._limits, self.loop.time() - self._began
        if self._part is not _Part.BODY:
            return limits.head_s - spent
        return limits.head_s + limits.body_s + self._body_bytes / limits.body_rate - spent

    def _look_later(self, delay_s: float) -> None:
        self._timer = self.loop.call_later(delay_s, self._look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        left = self._time_left()
        # Nothing more is read while the server itself has enough of this client to work on.
        if left > 0 or self.flow.read_paused:
            self._look_later(max(left, 1.0))
        elif self._part is _Part.NONE:
            self.transport.close()
        else:
            part = self._part.name.lower()
            seconds = self.loop.time() - self._began
            message = f"the {part} did not come whole within {seconds:.0f} s"
            self._refuse(RequestError(message, status=408, field=part))

    def _refuse(self, error: RequestError) -> None:
        """Answer, drop what comes, and close."""
        self._refused = True
        self._unread = 0
        self._stop_timer()
        self._unset_keepalive_if_required()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # Whoever answers it learns that the client is gone.
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started or self.pipeline or self._part is not _Part.BODY:
                self.transport.close()
                return
        self.transport.write(_raw(error))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_S, self.transport.close)


def _raw(error: RequestError) -> bytes:
    body = orjson.dumps(failure_body(error))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **failure_headers(error),
    }
    head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, "", ""]).encode() + body
