"""Requests in the engines' own form that nobody waits for any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.faulty_engine import Fault, FaultyEngine
from tests.unit.router.fronts import PROMPT, Run, front


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request_at_the_engine(run: Run, stream: bool) -> None:
    async def main() -> None:
        async with FaultyEngine(tick_s=5.0) as engine, front(engine) as router:
            asking = asyncio.ensure_future(router.generate(stream=stream))
            while not engine.requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.wait([asking])
            while not engine.left or router.pool.in_flight:
                await asyncio.sleep(0.01)
            assert router.pool.stats.stopped == 1
            assert router.pool.worker(engine.url).in_flight == 0

    run(main())


def test_a_client_that_goes_away_while_it_waits_takes_no_engine(run: Run) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[Fault.HANG]) as engine,
            front(engine, per_worker=1) as router,
        ):
            first = asyncio.ensure_future(router.generate())
            while not engine.requests:
                await asyncio.sleep(0.01)
            second = asyncio.ensure_future(router.generate())
            while not router.pool.waiting:
                await asyncio.sleep(0.01)
            second.cancel()
            while router.pool.waiting:
                await asyncio.sleep(0.01)
            first.cancel()
            while router.pool.in_flight:
                await asyncio.sleep(0.01)
            assert len(engine.requests) == 1

    run(main())


@pytest.mark.parametrize(
    ("dialect", "path", "fields", "empty"),
    [
        ("sglang", "/generate", {"input_ids": PROMPT}, lambda body: body["output_ids"]),
        ("sglang", "/generate", {"input_ids": [PROMPT] * 2}, lambda body: body[1]["output_ids"]),
        (
            "vllm",
            "/inference/v1/generate",
            {"token_ids": PROMPT},
            lambda body: body["choices"][0]["token_ids"],
        ),
        ("vllm", "/v1/completions", {"prompt": "a"}, lambda body: body["choices"][0]["text"]),
        (
            "vllm",
            "/v1/chat/completions",
            {"messages": []},
            lambda body: body["choices"][0]["message"]["content"],
        ),
    ],
)
def test_an_abort_answers_those_who_wait_with_no_tokens(
    run: Run, dialect: str, path: str, fields: dict[str, Any], empty: Callable[[Any], Any]
) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(dialect, script=[Fault.HANG]) as engine,
            front(engine, per_worker=1) as router,
        ):
            url = f"{router.url}{path}"
            first = asyncio.ensure_future(router.http.post(url, json=fields))
            while not engine.requests:
                await asyncio.sleep(0.01)
            second = asyncio.ensure_future(router.http.post(url, json=fields))
            while not router.pool.waiting:
                await asyncio.sleep(0.01)
            await router.pool.abort()
            assert router.pool.worker(engine.url).engine.aborted is None  # type: ignore[attr-defined]
            async with await second as reply:
                body = await reply.json()
            assert reply.status == 200
            assert not empty(body)
            assert "abort" in json.dumps(body)
            first.cancel()

    run(main())


def test_the_name_of_a_passed_on_request_reaches_its_engine_when_it_is_aborted(run: Run) -> None:
    async def main() -> None:
        async with FaultyEngine(script=[Fault.HANG]) as engine, front(engine) as router:
            asking = asyncio.ensure_future(router.generate(rid="mine"))
            while not engine.requests:
                await asyncio.sleep(0.01)
            await router.pool.abort(["mine"])
            assert router.pool.worker(engine.url).engine.aborted == ["mine"]  # type: ignore[attr-defined]
            asking.cancel()

    run(main())
