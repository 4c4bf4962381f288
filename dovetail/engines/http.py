"""JSON over HTTP with one server: whatever goes wrong is one of the errors that a pool of engines
acts on. Several parts of a run ask servers; this is the only way they do."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from dovetail.types.errors import EngineBusyError, EngineError, EngineGoneError

_CONNECT_S = 10.0
# Under uvicorn's 5 s: a connection that the server is about to close is not used again.
_KEEP_ALIVE_S = 4.0
_MOST_BYTES = 2**30
"""Of one answer."""
_SHOWN = 600
_BUSY = (429, 503)
_BETWEEN = (502, 504)
"""What something in front of a server says when the server is gone."""
_DONE = b"[DONE]"
_OF_ERRORS = {"error", "object", "message"}
"""Keys of an event that says why the stream ends."""


class EngineRefusedError(EngineError):
    """The server answered that it will not, or could not, do this: another try is of no use.

    Args:
        status: the HTTP status, 400 or more; 200 for an error inside a stream.
        said: the server's own message.
    """

    def __init__(self, message: str, status: int = 400, said: str = "") -> None:
        super().__init__(message, status, said)
        self.status, self.said = status, said

    def __str__(self) -> str:
        return str(self.args[0])


class HttpClient:
    """Asks one server. Connections are opened on first use, on the loop in use then.

    Every method raises:
        EngineGoneError: the server can't be reached, broke off, took too long or answered what is
            no JSON: another server may do better.
        EngineBusyError: status 429 or 503, with the server's Retry-After.
        EngineRefusedError: any other status from 400 on, with the server's message.

    Args:
        url: `http://host:port`.
        token: bearer token; it is in no message.
        timeout_s: longest time for an answer, where a call names no other.
        name: what messages call the server; default: `the engine at URL`.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 14400.0,
        *,
        name: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._token, self._timeout_s = token, timeout_s
        self._name = name or f"the engine at {self.url}"
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON of an answer; {} for an empty one."""
        return await self._json("GET", path, None, timeout_s)

    async def post(
        self,
        path: str,
        body: Any = None,
        *,
        timeout_s: float | None = None,
        last: bool = False,
    ) -> Any:
        """Send JSON; the JSON of the answer, {} for an empty one.

        Args:
            last: nothing else goes over this connection. For what may make the server fail: it
                closes the connection behind such an answer, and the next request would break off.
        """
        return await self._json("POST", path, body, timeout_s, last=last)

    async def tell(
        self, path: str, body: Any = None, *, method: str = "POST", timeout_s: float | None = None
    ) -> str:
        """As `post`, where the answer is words, if anything, and only its status counts."""
        raw = await self._answer(method, path, body, timeout_s)
        return raw.decode(errors="replace")

    async def stream(
        self, path: str, body: Any, *, timeout_s: float | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Send JSON; the objects of the answer's server-sent events, until `[DONE]`."""
        async with self._reply("POST", path, body, timeout_s) as reply:
            async for event in _events(reply.content):
                if event == _DONE:
                    return
                yield self._event(path, event)
        raise EngineGoneError(f"{self._at(path)} broke off before the end of its answer")

    async def close(self) -> None:
        """Close the connections; the next request opens them again."""
        session, self._session = self._session, None
        if session is None:
            return
        if self._loop is asyncio.get_running_loop():
            await session.close()
        else:
            session.detach()

    async def _json(
        self, method: str, path: str, body: Any, timeout_s: float | None, *, last: bool = False
    ) -> Any:
        raw = await self._answer(method, path, body, timeout_s, last=last)
        return self._parsed(path, raw) if raw.strip() else {}

    async def _answer(
        self, method: str, path: str, body: Any, timeout_s: float | None, *, last: bool = False
    ) -> bytes:
        async with self._reply(method, path, body, timeout_s, last=last) as reply:
            return await _read(reply)

    @contextlib.asynccontextmanager
    async def _reply(
        self, method: str, path: str, body: Any, timeout_s: float | None, *, last: bool = False
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        limit = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with self._request(method, path, body, limit, last) as reply:
                if reply.status >= 300:
                    raise self._refusal(path, reply, await _read(reply))
                yield reply
        except (TimeoutError, aiohttp.ClientError, ValueError, OSError) as error:
            raise self._gone(path, error, limit) from error

    def _request(self, method: str, path: str, body: Any, limit: float, last: bool) -> Any:
        data, headers = None, {"Connection": "close"} if last else {}
        if body is not None:
            data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
            headers["Content-Type"] = "application/json"
        return self._open().request(
            method,
            self.url + path,
            data=data,
            headers=headers,
            # A redirect could carry the token away.
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=limit, sock_connect=min(limit, _CONNECT_S)),
        )

    def _open(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            if self._session is not None:
                self._session.detach()
            headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
            # No proxies, cookies or credentials out of the environment.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
                headers=headers,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            self._loop = loop
        return self._session

    def _parsed(self, path: str, raw: bytes) -> Any:
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            with contextlib.suppress(ValueError, RecursionError):
                # Numbers that are none (NaN, Infinity) are for whoever reads them to refuse.
                return json.loads(raw)
            shown = self._shown(raw.decode(errors="replace"))
            raise EngineGoneError(
                f"{self._at(path)} answered what is not JSON ({error}): {shown}"
            ) from error

    def _event(self, path: str, raw: bytes) -> dict[str, Any]:
        found = self._parsed(path, raw)
        if not isinstance(found, dict):
            raise EngineGoneError(f"{self._at(path)} streamed what is no object")
        if found.keys() <= _OF_ERRORS:
            said = self._shown(_message(found))
            raise EngineRefusedError(f"{self._at(path)} failed: {said}", 200, said)
        return found

    def _refusal(self, path: str, reply: aiohttp.ClientResponse, raw: bytes) -> EngineError:
        try:
            parsed = orjson.loads(raw)
        except orjson.JSONDecodeError:
            parsed = None
        text = raw.decode(errors="replace") if parsed is None else _message(parsed)
        said = self._shown(text)
        message = f"{self._at(path)} answered with status {reply.status}: {said or 'no message'}"
        if reply.status in _BUSY:
            return EngineBusyError(message, _seconds(reply.headers.get("Retry-After")))
        if reply.status in _BETWEEN or (reply.status >= 500 and parsed is None):
            return EngineGoneError(message)
        return EngineRefusedError(message, reply.status, said)

    def _gone(self, path: str, error: Exception, limit: float) -> EngineGoneError:
        if isinstance(error, TimeoutError):
            return EngineGoneError(f"{self._at(path)} gave no answer within {limit:g} s")
        said = self._shown(f"{type(error).__name__}: {error}")
        return EngineGoneError(f"{self._at(path)} can't be reached, or broke off: {said}")

    def _at(self, path: str) -> str:
        return f"{self._name} ({path.partition('?')[0]})"

    def _shown(self, text: str) -> str:
        text = text if self._token is None else text.replace(self._token, "***")
        return " ".join(text.split())[:_SHOWN]


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """The body.

    Raises:
        ValueError: it is longer than any answer can be.
    """
    if reply.content_length is not None and reply.content_length <= _MOST_BYTES:
        return await reply.read()
    raw = bytearray()
    async for chunk in reply.content.iter_any():
        raw += chunk
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"an answer of more than {_MOST_BYTES} bytes")
    return bytes(raw)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events. Lines of any length: an event may hold a whole response."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MOST_BYTES:
            raise ValueError(f"an event of more than {_MOST_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _message(body: Any) -> str:
    """What an error says, in any of the shapes in use."""
    for _ in range(3):
        if not isinstance(body, dict):
            break
        inner = next((body[key] for key in ("error", "message", "detail") if body.get(key)), None)
        if inner is None:
            break
        body = inner
    return body if isinstance(body, str) else orjson.dumps(body).decode()


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 1.0))
    except ValueError:  # A date: rare, and a second is as good a guess.
        return 1.0
