"""Requests in the engines' own form: the bytes go on as they came, the answer comes back as it is.

    client --bytes--> Pool.run: slot, attempt, again elsewhere --bytes--> engine
       ^                                                                    |
       +---- whole (up to MOST_WHOLE), or event by event -------------------+

As long as nothing of an answer was passed on, another engine can make it anew; after that a failure
is told to the client: as a last event of a stream, or by an end that comes too early.
"""

from __future__ import annotations

import asyncio
import re

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.router.balancer.aborted import aborted
from dovetail.router.balancer.dispatch import Stopped
from dovetail.router.balancer.pick import session_key
from dovetail.router.balancer.pool import Pool
from dovetail.router.balancer.upstream import Reply, Upstream
from dovetail.router.balancer.worker import Call, Interrupt, Worker
from dovetail.router.bridge import failed
from dovetail.router.respond import failure, failure_body
from dovetail.types.errors import EngineBusyError, EngineError, EngineGoneError

NATIVE = {
    "/generate": "sglang",
    "/inference/v1/generate": "vllm",
    "/v1/completions": "vllm",
    "/v1/chat/completions": "vllm",
}
"""Path -> dialect of the engines that it is passed on to."""

WATCH_AFTER_S = 0.2
"""An answer that takes longer has a task that looks whether its client is still there."""
_PROMPTS = (b'"input_ids"', b'"token_ids"', b'"messages"', b'"prompt"', b'"text"')
_PROMPT_WITHIN, _PROMPT_MOST = 2**16, 2**20
_OF_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
_NOT_SENT = _OF_CONNECTION | {b"host", b"content-length", b"expect"}
_NOT_RETURNED = _OF_CONNECTION | {b"date", b"server"}
_RID = re.compile(rb'"rid"\s*:\s*"([\w.:#-]{1,200})"')
_BUSY = (429, 503)
_BETWEEN = (502, 504)
_EVENT_END = b"\n\n"
_MOST_EVENT = 2**22


class PassThrough:
    """ASGI middleware: what the proxy takes goes through it, the rest to the application."""

    def __init__(self, app: ASGIApp, proxy: Proxy) -> None:
        self._app, self._proxy = app, proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._proxy.takes(scope):
            await self._proxy(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class Proxy:
    """An ASGI application that passes requests on to the engines of a pool, on the pool's loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._upstreams: dict[Worker, tuple[int, Upstream]] = {}
        pool.at_close.append(self.close)

    def takes(self, scope: Scope) -> bool:
        """Whether every engine speaks the form of this request."""
        dialect = self._pool.dialect
        return (
            dialect is not None
            and NATIVE.get(scope["path"]) == dialect
            and scope["method"] == "POST"
        )

    def close(self) -> None:
        """Break the connections to all engines."""
        for _, upstream in self._upstreams.values():
            upstream.close()
        self._upstreams.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:
            return
        exchange = _Exchange(self, scope, body, send)
        call = exchange.call
        call.dialect = self._pool.dialect
        timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, exchange.watch, receive)
        try:
            reply = await self._pool.run(call, exchange.attempt)
        except Stopped as stopped:
            await exchange.stopped(stopped.why)
        except EngineError as error:
            await exchange.failed(error, receive)
        else:
            if not call.begun:
                await exchange.pass_on(reply)
        finally:
            timer.cancel()
            exchange.close()

    def upstream(self, worker: Worker) -> Upstream:
        """Connections to the engine in its present life."""
        epoch, upstream = self._upstreams.get(worker, (-1, None))
        if upstream is not None and epoch == worker.epoch:
            return upstream
        if upstream is not None:
            upstream.close()
        for other in [one for one in self._upstreams if one.url not in self._pool.workers]:
            self._upstreams.pop(other)[1].close()
        upstream = Upstream(worker.url)
        self._upstreams[worker] = worker.epoch, upstream
        return upstream


class _Exchange:
    """One request of a client, with its answer."""

    __slots__ = ("_body", "_events", "_name", "_proxy", "_scope", "_send", "_watcher", "call")

    def __init__(self, proxy: Proxy, scope: Scope, body: bytes, send: Send) -> None:
        self._proxy, self._scope, self._body, self._send = proxy, scope, body, send
        self._watcher: asyncio.Task[None] | None = None
        self._events = False
        self._name = _name(body) if scope["path"] == "/generate" else None
        self.call = Call(_prompt(body), session_key(scope["headers"]))

    async def attempt(self, worker: Worker) -> Reply:
        """Send it to this engine.

        Raises:
            EngineGoneError, EngineBusyError: another one may answer it.
        """
        upstream = self._proxy.upstream(worker)
        request = [self._head(worker, upstream.host_header), self._body]
        reply = await upstream.ask(request)
        if reply.body is not None:
            _check(worker, reply, reply.body)
            self._check_name(worker, reply, reply.body)
            return reply
        try:
            self.call.begun, self._events = True, reply.events
            await self._stream(reply)
        finally:
            reply.close()
        return reply

    async def pass_on(self, reply: Reply) -> None:
        """The whole answer."""
        await self._start(reply)
        await self._send({"type": "http.response.body", "body": reply.body})

    async def stopped(self, why: Interrupt) -> None:
        """It was aborted before an engine had made anything of it, or its client is gone."""
        if why is Interrupt.CLIENT:
            return
        if self.call.begun:
            await self._last_event(b'{"error":{"message":"aborted","code":499}}')
            return
        kind, body = aborted(self._scope["path"], self._body)
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await self.pass_on(Reply(200, headers, body))

    async def failed(self, error: EngineError, receive: Receive) -> None:
        """Tell the client what is wrong."""
        told = failed(error)
        if self.call.begun:
            await self._last_event(orjson.dumps(failure_body(told)))
        else:
            await failure(told)(self._scope, receive, self._send)

    def watch(self, receive: Receive) -> None:
        """From now on see whether the client goes away."""
        self._watcher = asyncio.get_running_loop().create_task(self._gone(receive))

    def close(self) -> None:
        """Watch no more."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.call.aborted = True
        self.call.interrupt(Interrupt.CLIENT)

    def _check_name(self, worker: Worker, reply: Reply, body: bytes) -> None:
        """SGLang tells the request's name in its answer: one with another name was meant for
        another request.

        Raises:
            EngineGoneError: it has another one.
        """
        if reply.status == 200 and self._name is not None and not _names(body, self._name):
            reply.distrust()
            raise EngineGoneError(f"{worker.url} answered another request than it was asked")

    def _head(self, worker: Worker, host: bytes) -> bytes:
        scope = self._scope
        target = scope.get("raw_path") or scope["path"].encode()
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        token = worker.engine.token
        lines = [b"POST %b HTTP/1.1\r\nhost: %b\r\n" % (target, host)]
        for name, value in scope["headers"]:
            if name not in _NOT_SENT and (token is None or name != b"authorization"):
                lines.append(b"%b: %b\r\n" % (name, value))
        if token is not None:
            lines.append(b"authorization: Bearer %b\r\n" % token.encode())
        lines.append(b"content-length: %d\r\n\r\n" % len(self._body))
        return b"".join(lines)

    async def _start(self, reply: Reply) -> None:
        headers = [one for one in reply.headers if one[0] not in _NOT_RETURNED]
        await self._send(
            {"type": "http.response.start", "status": reply.status, "headers": headers}
        )

    async def _stream(self, reply: Reply) -> None:
        """Pass parts on as they come; of events only whole ones."""
        await self._start(reply)
        held = b""
        while chunk := await reply.chunk():
            if reply.events:
                chunk = held + chunk
                at = chunk.rfind(_EVENT_END)
                end = at + len(_EVENT_END) if at >= 0 else len(chunk) * (len(chunk) > _MOST_EVENT)
                held, chunk = chunk[end:], chunk[:end]
            if chunk:
                await self._part(chunk)
        await self._send({"type": "http.response.body", "body": held})

    async def _part(self, chunk: bytes) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _last_event(self, data: bytes) -> None:
        """Say in a stream of events why it ends. Any other body ends too early, which the client's
        HTTP notices."""
        if self._events:
            last = b"data: " + data + b"\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": last})


async def _body(receive: Receive) -> bytes | None:
    """All of it; None: the client went away."""
    message = await receive()
    if message["type"] == "http.disconnect":
        return None
    if not message.get("more_body"):
        return message.get("body", b"")  # type: ignore[no-any-return]
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
    return b"".join(parts)


def _prompt(body: bytes) -> bytes:
    """Where its prompt begins, as far as one sees that without reading it all: what stands before
    may differ between requests that share a prompt."""
    for name in _PROMPTS:
        at = body.find(name, 0, _PROMPT_WITHIN)
        if at >= 0:
            return body[at : at + _PROMPT_MOST]
    return body[:_PROMPT_MOST]


def _name(body: bytes) -> bytes | None:
    """The `rid` of a request, where it is a string without anything special in it."""
    at = body.find(b'"rid"')
    found = None if at < 0 else _RID.match(body, at)
    return None if found is None else found[1]


def _names(body: bytes, name: bytes) -> bool:
    """Whether this is in an answer as its `id`, or begins that of a choice, and is not only some
    number in it."""
    return any(
        b'"id":%b"%b%b' % (space, name, end) in body
        for space in (b"", b" ")
        for end in (b'"', b"_")
    )


def _check(worker: Worker, reply: Reply, body: bytes) -> None:
    """Refuse what is no engine's answer.

    Raises:
        EngineBusyError: it says that it is busy.
        EngineGoneError: something in front of it says that it is gone; or it is broken.
    """
    if reply.status in _BUSY:
        after = dict(reply.headers).get(b"retry-after", b"1")
        seconds = float(after) if after.isdigit() else 1.0
        raise EngineBusyError(f"{worker.url} is busy (status {reply.status})", seconds)
    if reply.status in _BETWEEN or (reply.status >= 500 and not _like_json(body)):
        shown = body[:200].decode(errors="replace")
        raise EngineGoneError(f"{worker.url} failed with status {reply.status}: {shown}")
    kind = next((value for name, value in reply.headers if name == b"content-type"), b"")
    if kind.startswith(b"application/json") and not _like_json(body):
        shown = body[:200].decode(errors="replace")
        raise EngineGoneError(f"{worker.url} answered what is no JSON: {shown!r}")


def _like_json(body: bytes) -> bool:
    """Whether it begins and ends as an object or a list; to read it all costs more than all the
    rest of the way."""
    body = body.strip()
    return (body[:1], body[-1:]) in ((b"{", b"}"), (b"[", b"]"))
