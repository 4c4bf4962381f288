"""How a fleet starts: what it waits for, what it says meanwhile, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from dovetail.engines.launch import LaunchSpec
from dovetail.runtime import starting as starting_module
from dovetail.runtime.fleet import EngineSpec
from dovetail.types import EngineError
from tests.unit.runtime.places import HASTY, Place, connect, lives, run, until


@contextlib.asynccontextmanager
async def serving(answers: dict[str, Any]) -> AsyncIterator[str]:
    """A server with these answers to GET; a number is a status."""

    async def answer(got: web.Request) -> web.Response:
        known = answers.get(got.path, 404)
        return web.Response(status=known) if isinstance(known, int) else web.json_response(known)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_who_is_waited_for_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting_module, "SAY_EVERY_S", 0.01)
    said: list[str] = []

    async def work() -> None:
        silent = EngineSpec("engine 0 (silent at there)", connect, url="http://127.0.0.1:9")
        task = asyncio.ensure_future(place.fleet(silent).start(place.path, said.append))
        await until(lambda: len(said) > 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        fleet = place.fleet(place.quick(0))
        await fleet.start(place.path, lambda text: said.insert(0, text))

    run(work())
    assert f"starting 1 engine; logs in {place.path}" in said
    assert "reaching 1 engine: http://127.0.0.1:9" in said
    assert said[-1].startswith("waiting for engine 0 (silent at there) for 0 s, at most ")
    assert said[-1].endswith(
        "\n  engine 0 (silent at there): nothing listens at http://127.0.0.1:9 yet"
    )


def test_why_a_started_engine_is_late_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting_module, "SAY_EVERY_S", 0.5)
    code = "import time; print('reading\\nweights 3 of 9', flush=True); time.sleep(60)"
    spec = LaunchSpec([sys.executable, "-S", "-c", code])
    said: list[str] = []

    async def work() -> None:
        fleet = place.fleet(EngineSpec("engine 0 (slow)", connect, launch=lambda port: spec))
        task = asyncio.ensure_future(fleet.start(place.path, said.append))
        await until(lambda: "weights 3" in said[-1] if said else False)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(work())
    why = said[-1].splitlines()[1]
    assert re.fullmatch(
        r"  engine 0 \(slow\): nothing listens at http://127.0.0.1:\d+ yet; process \d+ runs; "
        r"the last line of its log \S+/engine_0.log: weights 3 of 9",
        why,
    )


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/version": {"version": "0.32.0"}}, "is a server of vLLM.*use --rollout-engine vllm "),
        ({"/health": {}}, "is no engine: GET /model_info answered with status 404.*correct --roll"),
        ({"/model_info": 401}, "wants a token.*status 401.*--engine-token-env NAME"),
    ],
    ids=["another engine", "no engine", "closed"],
)
def test_attaching_to_the_wrong_kind_of_server_ends_at_once(
    place: Place, answers: dict[str, Any], said: str
) -> None:
    patient = dataclasses.replace(HASTY, start_timeout_s=3600.0)

    async def work() -> None:
        async with serving(answers) as url:
            spec = EngineSpec(f"engine 0 (sglang at {url})", connect, url=url)
            with pytest.raises(EngineError, match=rf"^engine 0 \(sglang at .*\): .*{said}"):
                await place.fleet(spec, health=patient).start(place.path)

    run(work())


def test_where_nothing_listens_only_who_asks_for_it_waits(place: Place) -> None:
    hasty = dataclasses.replace(HASTY, start_timeout_s=3600.0, waits_for_attached=False)

    async def work() -> None:
        spec = EngineSpec("engine 0 (sglang)", connect, url="http://127.0.0.1:9")
        with pytest.raises(EngineError, match=r"nothing listens at http://127.0.0.1:9 .*timeout-s"):
            await place.fleet(spec, health=hasty).start(place.path)

    run(work())


def test_a_start_that_is_cancelled_leaves_nothing(place: Place) -> None:
    async def work() -> None:
        silent = EngineSpec("engine 1 (silent)", connect, url="http://127.0.0.1:9")
        fleet = place.fleet(place.quick(0), silent)
        task = asyncio.ensure_future(fleet.start(place.path))
        await until(place.pids)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())
    assert not [pid for pid in place.pids() if lives(pid)]
