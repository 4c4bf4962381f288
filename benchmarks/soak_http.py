"""HTTP/1.1 by hand: what a well-kept client never sends, and thousands of connections at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

ANSWER_S = 300.0
"""Longest wait for an answer, before it counts as a hang."""
_RESET = struct.pack("ii", 1, 0)
_SOURCES = 8
_numbers = itertools.count()


@dataclass(frozen=True)
class Target:
    """The server under test."""

    host: str
    port: int
    token: str | None = None
    patience: float = 1.0
    """Share of the time for which clients hold out."""

    @property
    def host_header(self) -> str:
        """As an ordinary client sends it."""
        return f"{self.host}:{self.port}"

    def head(
        self, method: str, path: str, headers: Iterable[str] = (), *, token: str | None = None
    ) -> bytes:
        """Request line and headers. `token` goes instead of the right one; "" sends none."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host_header}", *headers]
        sent = self.token if token is None else token
        if sent:
            lines.append(f"Authorization: Bearer {sent}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def request(self, method: str, path: str, body: Any = None, **more: Any) -> bytes:
        """A whole request; `body` is bytes, or anything JSON can hold."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        content = b"" if body is None else content
        lengths = [f"Content-Length: {len(content)}", "Content-Type: application/json"]
        return self.head(method, path, lengths, **more) + content


@dataclass
class Answer:
    """A whole answer; status 0: the connection ended without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


class Connection:
    """One connection. A context: leaving it resets the connection, which leaves no port waiting."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Connection:
        # A source address has some 28,000 ports, and every connection needs one.
        source = f"127.0.0.{2 + next(_numbers) % _SOURCES}"
        own = (source, 0) if self.target.host.startswith("127.") else None
        self.reader, self.writer = await asyncio.open_connection(
            self.target.host, self.target.port, local_addr=own, limit=2**20
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.reset()

    def reset(self) -> None:
        """End it without a word, as a client that was killed."""
        with suppress(OSError):
            found = self.writer.get_extra_info("socket")
            if found is not None:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.writer.transport.abort()

    async def send(self, data: bytes) -> bool:
        """Whether the server took it; False: it closed the connection."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            return False
        return True

    async def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        """Send a request, and wait for its answer."""
        await self.send(self.target.request(method, path, body, **more))
        return await self.answer()

    async def answer(self, timeout_s: float = ANSWER_S) -> Answer:
        """The next answer.

        Raises:
            TimeoutError: none came: the server hangs.
        """
        async with asyncio.timeout(timeout_s):
            try:
                head = await self.head()
                return Answer(head.status, head.headers, await self._body(head))
            except (ConnectionError, asyncio.IncompleteReadError):
                return Answer(0)

    async def head(self) -> Answer:
        """Status and headers of the next answer."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return Answer(int(lines[0].split()[1]), headers)

    async def chunk(self) -> bytes:
        """The next piece of an answer that is streamed; empty at its end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def _body(self, head: Answer) -> bytes:
        if "content-length" in head.headers:
            return await self.reader.readexactly(int(head.headers["content-length"]))
        if head.headers.get("transfer-encoding") != "chunked":
            return b""
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)
