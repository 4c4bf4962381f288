"""Requests to an ASGI application without a socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class Answered:
    """A whole answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream, without its end."""
        lines = [line for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


async def ask(app: Any, method: str, path: str, body: Any = None) -> Answered:
    """One request; the client stays until it is answered."""
    sent, parts, head = [body], [], {}
    over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if sent:
            given = sent.pop()
            content = b"" if given is None else json.dumps(given).encode()
            return {"type": "http.request", "body": content, "more_body": False}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    over.set()
    headers = {name.decode(): value.decode() for name, value in head["headers"]}
    return Answered(head["status"], headers, b"".join(parts))
