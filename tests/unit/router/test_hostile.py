"""Requests that cost a server far more than their sender."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest

from dovetail.router.bounded_tokenizer import BoundedTokenizer
from dovetail.router.fields import RequestError, shown
from dovetail.router.protocol import BoundedProtocol
from tests.unit.router.scripted import Client, Letters, Scripted, serving

BODY = {"text": "hi", "sampling_params": {"max_new_tokens": 2}}
HELLO = [{"role": "user", "content": "hi"}]


class Counting(Letters):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.settings: list[dict[str, Any]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded.append(text)
        return super().encode(text)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> list[int]:
        self.settings.append(kwargs)
        return [2, 3]

    def get_vocab(self) -> dict[str, int]:
        return {"a": 2, "twelve chars": 3}


def _run(work: Callable[[Client], Awaitable[Any]], engine: Scripted | None = None) -> Any:
    async def inside() -> Any:
        async with serving(engine or Scripted()) as client:
            return await work(client)

    return asyncio.run(inside())


def _refused(path: str, body: Any, status: int = 400) -> dict[str, Any]:
    async def work(client: Client) -> dict[str, Any]:
        refused = await client.refused(path, body, status)
        await client.ok("/generate", BODY)
        return refused

    return dict(_run(work))


def test_a_text_that_can_never_fit_is_not_encoded() -> None:
    counting = Counting()
    tokenizer = BoundedTokenizer(counting, 10)
    assert len(tokenizer.encode("x" * 120)) == 120
    with pytest.raises(RequestError, match=r"121 characters, and the 10 tokens .* 120 at most"):
        tokenizer.encode("x" * 121)
    assert counting.encoded == ["x" * 120]


def test_without_a_bound_every_text_is_encoded() -> None:
    assert len(BoundedTokenizer(Letters(), None).encode("x" * 10_000)) == 10_000


@pytest.mark.parametrize(
    "shown_to_it",
    [
        {"conversation": [{"role": "user", "content": "x" * 200}]},
        {"conversation": HELLO * 100},
        {"conversation": HELLO, "tools": [{"name": "x" * 200}]},
        {"conversation": HELLO, "documents": [{"x" * 200: 1}]},
    ],
)
def test_a_template_is_shown_no_more_than_the_context_holds(shown_to_it: dict[str, Any]) -> None:
    counting = Counting()
    with pytest.raises(RequestError, match="characters"):
        BoundedTokenizer(counting, 10).apply_chat_template(**shown_to_it)
    assert counting.settings == []


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"padding": "max_length", "max_length": 10**9}, "chat_template_kwargs"),
        ({"return_tensors": "pt"}, "chat_template_kwargs"),
        ({"tokenizer_kwargs": {}}, "chat_template_kwargs"),
        ({"chat_template": "{% for a in range(99999) %}{% endfor %}"}, "chat_template"),
    ],
)
def test_a_template_gets_its_variables_and_nothing_else(
    settings: dict[str, Any], field: str
) -> None:
    counting = Counting()
    tokenizer = BoundedTokenizer(counting, 10)
    with pytest.raises(RequestError) as caught:
        tokenizer.apply_chat_template(HELLO, **settings)
    assert caught.value.field == field
    tokenizer.apply_chat_template(HELLO, enable_thinking=True)
    assert counting.settings == [{"enable_thinking": True}]


def test_a_template_of_the_clients_own_is_refused() -> None:
    body = {"messages": HELLO, "chat_template": "{{ messages }}"}
    assert _refused("/v1/chat/completions", body)["param"] == "chat_template"


def test_a_setting_of_the_tokenizer_is_refused() -> None:
    body = {"messages": HELLO, "chat_template_kwargs": {"max_length": 10**9}}
    assert _refused("/v1/chat/completions", body)["param"] == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "x" * 1_000_000}),
        ("/v1/completions", {"prompt": "x" * 1_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1_000_000}]}),
        ("/tokenize", {"prompt": "x" * 1_000_000}),
        ("/generate", {"input_ids": [2] * 1_000_000}),
        ("/inference/v1/generate", {"token_ids": [2] * 1_000_000, "sampling_params": {}}),
    ],
)
def test_a_prompt_of_a_million_is_refused(path: str, body: Any) -> None:
    assert _refused(path, body)["param"] == "prompt"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"text": ["a"] * 4097}, "text"),
        ("/generate", {"input_ids": [[2]] * 4097}, "input_ids"),
        ("/generate", {"text": ["a"] * 17, "sampling_params": {"n": 256}}, "sampling_params.n"),
        ("/v1/completions", {"prompt": ["a"] * 4097}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 17, "n": 256}, "n"),
        ("/generate", BODY | {"sampling_params": {"stop": ["a"] * 257}}, "sampling_params.stop"),
    ],
)
def test_one_request_is_for_so_many_answers_at_most(path: str, body: Any, field: str) -> None:
    assert _refused(path, body)["param"] == field


@pytest.mark.parametrize(
    ("body", "what"), [(b"[" + b"1," * (2**23 + 1) + b"1]", "values"), (b"[" * 2_000_000, "lists")]
)
def test_json_of_very_many_values_is_not_read(body: bytes, what: str) -> None:
    async def work(client: Client) -> tuple[int, Any]:
        async with client.session.post(client.server.url + "/generate", data=body) as answer:
            return answer.status, await answer.json()

    status, content = _run(work)
    assert status == 413
    assert what in content["message"]


class Slow(Letters):
    """Takes its time over long texts, on whatever thread."""

    threads: Sequence[threading.Thread] = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 100:
            Slow.threads = [*Slow.threads, threading.current_thread()]
            time.sleep(0.3)
            return [2]
        return super().encode(text)

    def get_vocab(self) -> dict[str, int]:
        return {"x" * 100_000: 2}


def test_others_are_answered_while_a_large_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.router.scripted.Letters", Slow)

    async def work(client: Client) -> int:
        large = [
            asyncio.ensure_future(client.ok("/generate", BODY | {"text": "x" * 600_000}))
            for _ in range(3)
        ]
        meanwhile = 0
        while not all(one.done() for one in large):
            await client.ok("/generate", BODY)
            meanwhile += 1
        await asyncio.gather(*large)
        return meanwhile

    # Three times 0.3 seconds: many of them.
    assert _run(work) > 5
    assert len({thread.ident for thread in Slow.threads}) == 1


def test_a_top_k_beyond_every_vocabulary_is_no_bound() -> None:
    engine = Scripted()

    async def work(client: Client) -> None:
        params = {"max_new_tokens": 2, "top_k": 2**63}
        await client.ok("/generate", {"text": "hi", "sampling_params": params})

    _run(work, engine)
    assert engine.requests[0].sampling.top_k == 2**31 - 1


@pytest.mark.parametrize(
    "value",
    [[1] * 1000, ["x" * 1000] * 1000, {"a": {"b": [1] * 100}}, "y" * 1000, [[[]] * 50] * 50, None],
)
def test_what_is_shown_of_a_value_is_its_beginning(value: Any) -> None:
    whole = repr(value)
    assert shown(value) == (whole if len(whole) <= 80 else whole[:80] + "...")


class Endless(list[int]):
    """A list that nobody gets to the end of."""

    def __iter__(self) -> Iterator[int]:
        yield from [0] * 1000
        raise AssertionError("too many were looked at")


def test_no_more_of_a_value_is_looked_at_than_is_shown() -> None:
    assert shown([Endless([0] * 10)]).startswith("[[0, 0, 0")


def test_a_client_that_sends_on_and_goes_ends_the_request_that_is_answered() -> None:
    engine = Scripted()
    content = json.dumps(BODY).encode()
    lines = ["POST /generate HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
    request = "\r\n".join([*lines, "", ""]).encode() + content

    async def work(client: Client) -> None:
        engine.held = asyncio.Event()
        server = client.server
        _, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(request * 3)
        await client.until(1)
        writer.transport.abort()
        await client.until(0)

    _run(work, engine)
    assert len(engine.requests) == len(engine.cancelled) == 1


def test_nothing_is_left_of_connections_that_were_reset() -> None:
    async def work(client: Client) -> int:
        for _ in range(20):
            server = client.server
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            found = writer.get_extra_info("socket")
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        # The client's own connection stays.
        for _ in range(100):
            await client.ok("/generate", BODY)
            gc.collect()
            left = sum(isinstance(one, BoundedProtocol) for one in gc.get_objects())
            if left <= 1:
                break
        return left

    assert _run(work) == 1
