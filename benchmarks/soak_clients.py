"""Clients that mean harm, or are broken, and what a server may answer them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from benchmarks.soak_http import ANSWER_S, Connection, Target

MB = 1_000_000
GONE = "closed"
"""The server ended the connection without an answer."""
LEFT = "left"
"""The client did."""
_BIG = 100 * MB
_PIECE = 4 * MB

Attack = Callable[[Target, random.Random], Awaitable[str]]
"""One client; what became of it: a status, `closed`, `left` or `hang`."""


@dataclass(frozen=True)
class Band:
    """Many clients of one kind."""

    name: str
    attack: Attack
    clients: int
    """Of a whole soak."""
    at_once: int
    allowed: frozenset[str]

    async def run(self, target: Target, seed: int, scale: float) -> Counter[str]:
        """What became of them."""
        turn = asyncio.Semaphore(self.at_once)

        async def one(number: int) -> str:
            async with turn:
                try:
                    return await self.attack(target, random.Random(f"{seed} {self.name} {number}"))
                except TimeoutError:
                    return "hang"
                except ConnectionError:
                    return GONE

        many = max(1, round(self.clients * scale))
        return Counter(await asyncio.gather(*(one(number) for number in range(many))))


async def slow_head(target: Target, draw: random.Random) -> str:
    """A byte of the head each second."""
    head = target.head("POST", "/generate", [f"X-Filler: {'a' * 4000}"])
    return await _drip(target, b"", head)


async def slow_body(target: Target, draw: random.Random) -> str:
    """A byte of the body each second."""
    head = target.head("POST", "/generate", ["Content-Length: 4000"])
    return await _drip(target, head, b"x" * 4000)


async def _drip(target: Target, first: bytes, rest: bytes) -> str:
    async with Connection(target) as connection:
        await connection.send(first)
        answer = asyncio.ensure_future(connection.answer(ANSWER_S))
        for place in range(len(rest)):
            done, _ = await asyncio.wait([answer], timeout=target.patience)
            if done or not await connection.send(rest[place : place + 1]):
                break
        return _told((await answer).status)


async def silent(target: Target, draw: random.Random) -> str:
    """Connects and says nothing."""
    async with Connection(target) as connection:
        return _told((await connection.answer()).status)


async def deaf(target: Target, draw: random.Random) -> str:
    """Asks again and again and reads nothing."""
    async with Connection(target) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            async with asyncio.timeout(draw.uniform(10, 20) * target.patience):
                taken = await connection.send(target.request("GET", "/openapi.json") * 500)
                await asyncio.sleep(20)
        except TimeoutError:
            return LEFT
        return LEFT if taken else GONE


async def big_body(target: Target, draw: random.Random) -> str:
    """100 MB, of one kind or another."""
    path = draw.choice(["/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"])
    before, filler, after = draw.choice(_BODIES)
    length = len(before) + len(after) + (_BIG // len(filler)) * len(filler)
    async with Connection(target) as connection:
        answer = asyncio.ensure_future(connection.answer())
        await connection.send(target.head("POST", path, [f"Content-Length: {length}"]) + before)
        for piece in _pieces(filler):
            if answer.done() or not await connection.send(piece):
                break
        await connection.send(after)
        return _told((await answer).status)


_BODIES: list[tuple[bytes, bytes, bytes]] = [
    (b'{"text": "', b"word ", b'"}'),
    (b'{"prompt": "', b"\\u00e4", b'"}'),
    (b'{"input_ids": [1', b",1", b"]}"),
    (b'{"prompt": [1', b",1", b"]}"),
    (b'{"messages": [{"role": "user", "content": "', b"a", b'"}]}'),
    (b'{"messages": [{"role": "user"}', b',{"role": "user"}', b"]}"),
    (b"", b"[", b""),
    (b'{"text": ["a"', b',"a"', b"]}"),
    (b'{"input_ids": [[1]', b",[1]", b"]}"),
    (b'{"input_ids": [1', b",           1", b"]}"),
    (b"", b"\x00\xff", b""),
    (b'{"text": 1', b"0", b"}"),
    (b'{"a": 0', b',"a": 1', b"}"),
]
"""Beginning, what is repeated, end."""


def _pieces(filler: bytes) -> Iterator[bytes]:
    piece = filler * (_PIECE // len(filler))
    times, rest = divmod((_BIG // len(filler)) * len(filler), len(piece))
    for _ in range(times):
        yield piece
    yield piece[:rest]


async def too_big(target: Target, draw: random.Random) -> str:
    """More than is allowed: announced, or in chunks without an end."""
    async with Connection(target) as connection:
        if draw.random() < 0.5:
            await connection.send(target.head("POST", "/generate", ["Content-Length: 99999999999"]))
            return _told((await connection.answer()).status)
        await connection.send(target.head("POST", "/generate", ["Transfer-Encoding: chunked"]))
        answer = asyncio.ensure_future(connection.answer())
        piece = b"%x\r\n%b\r\n" % (_PIECE, b" " * _PIECE)
        for _ in range(64):
            if answer.done() or not await connection.send(piece):
                break
        return _told((await answer).status)


async def huge_head(target: Target, draw: random.Random) -> str:
    """A long header, many of them, or a long path."""
    kinds: list[list[str]] = [
        [f"X-Long: {'a' * MB}"],
        [f"X-{number}: b" for number in range(50_000)],
        [f"Cookie: {'c=d; ' * 200_000}"],
    ]
    path = "/generate" if draw.random() < 0.7 else "/" + "p" * MB
    async with Connection(target) as connection:
        await connection.send(target.head("POST", path, draw.choice(kinds)))
        return _told((await connection.answer()).status)


async def no_http(target: Target, draw: random.Random) -> str:
    """What is no HTTP, or two things at once."""
    host = f"Host: {target.host_header}\r\n"
    rest = "GET /health HTTP/1.1\r\n\r\n"
    kinds = [
        draw.randbytes(2000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500),
        f"POST /generate HTTP/1.1\r\n{host}Content-Length: -1\r\n\r\n".encode(),
        f"POST /generate HTTP/1.1\r\n{host}Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"
        "".encode(),
        f"POST /generate HTTP/1.1\r\n{host}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        f"0\r\n\r\n{rest}".encode(),
        f"POST /generate HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\nzzz\r\n".encode(),
        f"GET /health HTTP/1.1\r\n{host}{host}\r\n".encode(),
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    async with Connection(target) as connection:
        await connection.send(draw.choice(kinds))
        return _told((await connection.answer()).status)


async def wrong_token(target: Target, draw: random.Random) -> str:
    """Another token, none, or half of it."""
    given = draw.choice(["", "x" * draw.randrange(1, 4000), str(target.token)[:-1], "\xff\xfe"])
    method, path = draw.choice(
        [("POST", "/generate"), ("POST", "/sessions"), ("DELETE", "/workers"), ("GET", "/metrics")]
    )
    async with Connection(target) as connection:
        return _told((await connection.ask(method, path, {}, token=given)).status)


async def vanishing(target: Target, draw: random.Random) -> str:
    """Goes at some point: in the head, the body, before the answer, or in the middle of a
    stream."""
    path = draw.choice(["/generate", "/v1/completions", "/v1/chat/completions"])
    request = target.request("POST", path, _stream_of(path, draw))
    place = draw.randrange(4)
    async with Connection(target) as connection:
        if place == 0:
            await connection.send(request[: draw.randrange(len(request))])
            await asyncio.sleep(draw.random() / 10)
            return LEFT
        await connection.send(request)
        if place == 1:
            await asyncio.sleep(draw.random())
            return LEFT
        async with asyncio.timeout(ANSWER_S):
            return await _read_some(connection, 1 if place == 2 else 0)


async def _read_some(connection: Connection, chunks: int) -> str:
    """The beginning of an answer."""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        head = await connection.head()
        if head.status != 200:
            return str(head.status)
        for _ in range(chunks):
            await connection.chunk()
    return LEFT


def _stream_of(path: str, draw: random.Random) -> dict[str, Any]:
    tokens = draw.randrange(8, 100)
    if path == "/generate":
        own = {"max_new_tokens": tokens, "ignore_eos": True}
        return {"text": "12+34=", "sampling_params": own, "stream": True}
    asked = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    if path == "/v1/completions":
        return {"prompt": "12+34=", **asked}
    return {"messages": [{"role": "user", "content": "12+34="}], **asked}


_TEMPLATE = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
_NESTED = "[" * 500 + "]" * 500
_VALUES = [
    *("null", "true", "-1", "0", "1", "9223372036854775808", "1e308", "-1e308", "0.5", "1e999"),
    *("NaN", "Infinity", '""', '"x"', '"\\ud800"', '"\\u0000"', "[]", "[null]", "[[]]", "[{}]"),
    *("{}", '{"": null}', '{"a": {"b": []}}', "[-1]", '[""]', "[1.5]", '["x", 1]', "999999999"),
    *("[9223372036854775808]", "[4294967296]", "[-9223372036854775809]", "9223372036854775807"),
    *(_NESTED, json.dumps(_TEMPLATE), '"' + "9" * 5000 + '"', "[" + "1," * 5000 + "1]"),
]
_OK: dict[str, dict[str, Any]] = {
    "/generate": {"text": "1+2=", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"prompt": "1+2=", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "1+2="}], "max_tokens": 2},
    "/inference/v1/generate": {"token_ids": [4, 5], "sampling_params": {"max_tokens": 2}},
    "/tokenize": {"prompt": "1+2="},
    "/detokenize": {"tokens": [4, 5]},
    "/sessions": {},
}
"""A body that is right, of which one field is spoilt."""
_MORE = {
    "/sessions": ["session_id", "max_context_len", "evaluation", "sampling_params", "metadata"]
}


async def spoilt_bodies(target: Target) -> list[tuple[str, bytes]]:
    """Path and body of a request for each field of every route, with each wrong value."""
    async with Connection(target) as connection:
        paths = (await connection.ask("GET", "/openapi.json")).json["paths"]
        session = (await connection.ask("POST", "/sessions", {})).json["session_id"]
    made = []
    for path, right in _OK.items():
        known = paths.get(path, {}).get("post", {}).get("requestBody")
        schema = known["content"]["application/json"]["schema"] if known else {"properties": {}}
        fields = [(name,) for name in [*schema["properties"], *_MORE.get(path, [])]]
        fields += [
            (name, inner)
            for name, one in schema["properties"].items()
            for inner in (one.get("anyOf") or [one])[0].get("properties", {})
        ]
        bodies = [_spoilt(right, names, value) for names in fields for value in _VALUES]
        made += [(path, body) for body in bodies]
        if path == "/v1/chat/completions":
            made += [(f"/sessions/{session}{path}", body) for body in bodies]
    return made


def _spoilt(right: dict[str, Any], names: tuple[str, ...], value: str) -> bytes:
    outer = {**right}
    inner = outer
    for name in names[:-1]:
        own = inner.get(name)
        inner[name] = dict(own) if isinstance(own, dict) else {}
        inner = inner[name]
    inner[names[-1]] = "@@"
    return json.dumps(outer).replace('"@@"', value).encode()


async def spoil(target: Target, seed: int, share: float, at_once: int = 32) -> Counter[str]:
    """Send that share of all spoilt bodies, over connections that are kept; counts statuses."""
    bodies = await spoilt_bodies(target)
    chosen = random.Random(seed).sample(bodies, round(len(bodies) * share))
    found: Counter[str] = Counter()
    # What a session recorded is kept until it is ended, which is no leak.
    sessions = {path.split("/")[2] for path, _ in bodies if path.startswith("/sessions/")}

    async def client(own: list[tuple[str, bytes]]) -> None:
        while own:
            async with Connection(target) as connection:
                await _ask_all(connection, own, found, sessions)

    await asyncio.gather(*(client(chosen[number::at_once]) for number in range(at_once)))
    for session in sessions:
        async with Connection(target) as connection:
            await connection.ask("DELETE", f"/sessions/{quote(session, safe='')}")
    return found


async def _ask_all(
    connection: Connection,
    own: list[tuple[str, bytes]],
    found: Counter[str],
    sessions: set[str],
) -> None:
    """Until the server closes the connection. Sessions that are opened come to the others."""
    while own:
        path, body = own.pop()
        try:
            answer = await connection.ask("POST", path, body)
        except TimeoutError:
            found["hang"] += 1
            return
        told = _told(answer.status)
        found[told] += 1
        if path == "/sessions" and answer.status == 200:
            sessions.add(answer.json["session_id"])
        if told not in SPOILT_ALLOWED and found[told] <= 3:
            print(f"  {told}: {path} {body[:200]!r} -> {answer.body[:300]!r}", flush=True)
        if answer.status == 0 or answer.headers.get("connection") == "close":
            return


def _told(status: int) -> str:
    return str(status) if status else GONE


SPOILT_ALLOWED = frozenset({"200", "400", "404", "409", "410", "422"})
_NO = frozenset({"400", "403", GONE})
BANDS = (
    Band("slow head", slow_head, 300, 300, frozenset({"408"})),
    Band("slow body", slow_body, 300, 300, frozenset({"408"})),
    Band("silent", silent, 500, 500, frozenset({GONE})),
    Band("deaf", deaf, 100, 100, frozenset({LEFT, GONE})),
    Band("100 MB", big_body, 24, 2, frozenset({"400", "413", "503"})),
    Band("over the limit", too_big, 12, 2, frozenset({"413"})),
    Band("huge head", huge_head, 60, 8, frozenset({"431", "400"})),
    Band("no HTTP", no_http, 300, 50, _NO | {"404", "200", "401"}),
    Band("wrong token", wrong_token, 2000, 100, frozenset({"401"})),
    Band("vanishing", vanishing, 1000, 200, frozenset({LEFT, "503"})),
)
