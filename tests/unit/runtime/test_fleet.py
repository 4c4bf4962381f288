"""A fleet of engines: started, attached, looked after, given weights, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from dovetail.engines.launch import ClientSettings, LaunchSpec
from dovetail.engines.process import HeldPort, ServerProcess
from dovetail.engines.sglang.client import make_client
from dovetail.runtime import health
from dovetail.runtime import starting as starting_module
from dovetail.runtime.fleet import EngineSpec, Fleet
from dovetail.runtime.health import HealthSettings
from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
from dovetail.types import EngineError, GenerateRequest, GenerateResult, SamplingParams
from dovetail.types.ports import Engine, EngineControl, ScoringEngine
from dovetail.weights.publish import publish

PROGRAM = Path(__file__).parents[2] / "quick_engine.py"
HASTY = HealthSettings(
    interval_s=0.1,
    timeout_s=1.0,
    failure_threshold=2,
    start_timeout_s=20.0,
    waits_for_attached=True,
    repairs=True,
)
CLIENT = ClientSettings(max_context_len=256, vocab_size=80)


class Place:
    """Where a test's engines write, and what they are."""

    def __init__(self, path: Path, *, token_s: float = 0.0, load_s: float = 0.0) -> None:
        self.path, self.witness = path, path / "witness.jsonl"
        self.delays = [str(token_s), str(load_s)]
        self.model_dir = path / "model"
        self.model_dir.mkdir()
        (self.model_dir / "config.json").write_text("{}")
        self.fleets: list[Fleet] = []
        self.alone: list[tuple[ServerProcess, HeldPort]] = []

    def start_alone(self) -> str:
        """An engine that no fleet has started; its address."""
        port, launch = HeldPort(), self.quick().launch
        assert launch is not None
        log = self.path / f"alone_{len(self.alone)}.log"
        server = ServerProcess(launch(port.number).argv, log_file=log, name="engine alone")
        self.alone.append((server, port))
        server.start()
        return port.url

    def quick(self, number: int = 0) -> EngineSpec:
        def launch(port: int) -> LaunchSpec:
            start = [sys.executable, "-I", "-S", str(PROGRAM), str(port), str(self.witness)]
            return LaunchSpec([*start, *self.delays])

        return EngineSpec(f"engine {number} (quick)", connect, launch=launch)

    def broken(self, number: int = 0) -> EngineSpec:
        command = [sys.executable, "-S", "-c", "print('no such model'); raise SystemExit(3)"]
        return EngineSpec(
            f"engine {number} (broken)", connect, launch=lambda port: LaunchSpec(command)
        )

    def fleet(self, *specs: EngineSpec, **changes: Any) -> Fleet:
        def store() -> SnapshotStore:
            return SnapshotStore(Wanted("disk", self.path / "weights"), self.model_dir)

        made = Fleet(specs, **{"health": HASTY, "store": store, **changes})
        self.fleets.append(made)
        return made

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        lines = self.witness.read_text().splitlines() if self.witness.exists() else []
        events = [json.loads(line) for line in lines]
        return [one for one in events if kind in (None, one["event"])]

    def pids(self) -> list[int]:
        return [event["pid"] for event in self.events("start")]


def connect(url: str) -> Any:
    return make_client(url, CLIENT)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    end(made)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, token_s=0.02)
    yield made
    end(made)


def end(place: Place) -> None:
    for fleet in place.fleets:
        fleet.close()
    for server, port in place.alone:
        server.kill()
        port.close()
    assert not [pid for pid in place.pids() if lives(pid)]
    weights = place.path / "weights"
    assert not weights.exists() or not list(weights.iterdir())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def request(number: int, tokens: int = 4) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=tokens, seed=number)
    return GenerateRequest(f"r{number}", (3, 4, 5), sampling)


async def until(found: Callable[[], Any], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


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


def weights(version: int) -> Callable[[], Any]:
    return lambda: [("w", torch.full((4,), float(version)))]


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(main())


def test_engines_are_started_given_weights_used_and_ended(place: Place) -> None:
    async def work() -> list[GenerateResult]:
        fleet = place.fleet(place.quick(0), place.quick(1))
        await fleet.start(place.path / "logs")
        for port in (Engine, EngineControl, ScoringEngine):
            assert isinstance(fleet.engine, port)
        await publish([fleet.engine], 7, weights(7))
        results = await asyncio.gather(*(fleet.engine.generate(request(i)) for i in range(16)))
        facts = fleet.facts()
        assert [one.weight_version for one in facts] == [7, 7]
        assert sum(one.answered for one in facts) == 16
        assert fleet.metrics()["engines/weight_update_bytes"] == 16.0
        await fleet.engine.close()
        await fleet.engine.close()
        return list(results)

    results = run(work())
    assert [result.request_id for result in results] == [f"r{i}" for i in range(16)]
    assert all(result.version_spans[0].weight_version == 7 for result in results)
    assert sorted(path.name for path in (place.path / "logs").iterdir()) == [
        "engine_0.log",
        "engine_1.log",
    ]
    assert not [pid for pid in place.pids() if lives(pid)]


def test_only_the_last_weights_are_kept_and_a_new_engine_gets_them(place: Place) -> None:
    async def work() -> None:
        fleet = place.fleet(place.quick())
        await fleet.start(place.path)
        for version in (1, 2, 3):
            await publish([fleet.engine], version, weights(version))
            (kept,) = (place.path / "weights").glob("*/0*")
            assert kept.name == f"{version:06d}"
        os.kill(place.pids()[0], signal.SIGKILL)
        result = await fleet.engine.generate(request(0))
        assert result.version_spans[0].weight_version == 3

    run(work())
    assert [event["version"] for event in place.events("loaded")] == ["1", "2", "3", "3"]


def test_one_that_does_not_start_says_why_and_takes_the_others_along(place: Place) -> None:
    async def work() -> None:
        fleet = place.fleet(place.quick(0), place.broken(1))
        with pytest.raises(EngineError, match=r"engine 1 \(broken\) did not(.|\n)*such model"):
            await fleet.start(place.path)
        with pytest.raises(EngineError, match="not started, or closed"):
            await fleet.engine.generate(request(0))

    run(work())


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


def test_one_that_can_not_come_back_is_given_up_and_the_last_one_ends_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FIRST_REST_S", 0.01)

    async def work() -> None:
        fleet = place.fleet(place.quick(0), place.quick(1))
        await fleet.start(place.path)
        await publish([fleet.engine], 1, weights(1))
        first, second = fleet.far.members
        broken = place.broken().launch
        assert broken is not None and first.process is not None and second.process is not None
        first.process.command = tuple(broken(0).argv)
        first.process.kill()
        await until(lambda: first.given_up)
        # The other one goes on.
        assert (await fleet.engine.generate(request(1))).token_ids
        assert [one.ready for one in fleet.facts()] == [False, True]
        second.process.command = first.process.command
        second.process.kill()
        with pytest.raises(EngineError, match=r"no engine is left(.|\n)*such model"):
            await fleet.engine.generate(request(2))
        await until(lambda: second.given_up)
        with pytest.raises(EngineError, match="no engine is left"):
            await fleet.engine.generate(request(3))

    run(work())
    assert first_lines(place.path / "engine_0.log") == 1 + health.MOST_STARTS


def first_lines(log: Path) -> int:
    return sum(line.startswith("--- ") for line in log.read_text().splitlines())


def test_an_engine_that_every_start_only_brings_to_its_death_again_is_given_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FIRST_REST_S", 0.01)

    async def work() -> None:
        fleet = place.fleet(place.quick())
        await fleet.start(place.path)
        await publish([fleet.engine], 1, weights(1))
        with pytest.raises(EngineError, match=r"died 5 times in a row(.|\n)*out of memory"):
            await fleet.engine.generate(request(0, tokens=13))

    run(work())
    assert len(place.pids()) == 1 + health.MOST_STARTS


def test_rests_between_starts_in_vain_double_up_to_a_limit() -> None:
    rests = [health._rest_s(vain) for vain in range(9)]
    assert rests == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_an_engine_that_wakes_up_answers_nobody(slow: Place) -> None:
    async def work() -> None:
        fleet = slow.fleet(slow.quick(0), slow.quick(1))
        await fleet.start(slow.path)
        await publish([fleet.engine], 1, weights(1))
        requests = [fleet.engine.generate(request(i, tokens=30)) for i in range(8)]
        answers = asyncio.gather(*requests)
        await until(lambda: len(slow.events("begin")) == 8)
        zombie = slow.pids()[0]
        os.kill(zombie, signal.SIGSTOP)
        results = await answers
        assert len({result.request_id for result in results}) == 8
        assert all(len(result.token_ids) == 30 for result in results)
        assert not lives(zombie)
        assert fleet.metrics()["engines/resent_requests"] == 4.0

    run(work())


def test_an_attached_engine_is_left_alone_and_taken_back_when_it_answers_again(
    slow: Place,
) -> None:
    async def work() -> None:
        url = slow.start_alone()
        fleet = slow.fleet(EngineSpec("engine 0 (attached)", connect, url=url))
        await fleet.start(slow.path)
        await publish([fleet.engine], 5, weights(5))
        os.kill(slow.pids()[0], signal.SIGSTOP)
        await until(lambda: not fleet.facts()[0].ready)
        waiting = asyncio.ensure_future(fleet.engine.generate(request(1)))
        os.kill(slow.pids()[0], signal.SIGCONT)
        assert (await waiting).version_spans[0].weight_version == 5
        assert fleet.facts()[0].restarts == 1
        await fleet.engine.close()
        assert lives(slow.pids()[0])

    run(work())
    assert len(slow.pids()) == 1


def test_engines_come_and_go_twenty_times_and_no_request_is_lost(slow: Place) -> None:
    async def work() -> None:
        urls, rng = [slow.start_alone() for _ in range(3)], random.Random(0)
        await until(lambda: len(slow.pids()) == 3)
        fleet = slow.fleet(
            EngineSpec("engine 0 (attached)", connect, url=urls[0]),
            connect=lambda url, dialect: connect(url),
        )
        await fleet.start(slow.path)
        await publish([fleet.engine], 1, weights(1))
        answers = [asyncio.ensure_future(fleet.engine.generate(request(i))) for i in range(200)]
        for _ in range(20):
            have = list(fleet.pool.workers)
            url = rng.choice(urls if len(have) > 1 else [one for one in urls if one not in have])
            await fleet.thread.hop(_remove(fleet, url) if url in have else _add(fleet, url))
            await asyncio.sleep(0.02)
        results = await asyncio.gather(*answers)
        assert sorted(result.request_id for result in results) == sorted(
            f"r{i}" for i in range(200)
        )
        assert {result.version_spans[0].weight_version for result in results} == {1}
        facts = fleet.facts()
        there = {one.url for one in facts if not one.left}
        assert there == set(fleet.pool.workers)
        assert sum(one.answered for one in facts) == 200
        assert not [name for name in fleet.metrics() if name.startswith("engines/0/")] or (
            urls[0] in there
        )

    run(work())


async def _add(fleet: Fleet, url: str) -> None:
    fleet.pool.add(await fleet.connect(url, None), ready=False)
    await fleet.pool.admit(url)


async def _remove(fleet: Fleet, url: str) -> None:
    engine = await fleet.pool.remove(url, drain=random.random() < 0.5)
    await engine.close()


def test_an_engine_of_the_fleets_own_that_is_taken_out_is_ended(place: Place) -> None:
    async def work() -> None:
        fleet = place.fleet(place.quick(0), place.quick(1))
        await fleet.start(place.path)
        url = fleet.facts()[0].url
        await fleet.thread.hop(_remove(fleet, url))
        await until(lambda: len([pid for pid in place.pids() if lives(pid)]) == 1)
        assert [(one.url, one.left) for one in fleet.facts()] == [
            (url, True),
            *((one, False) for one in fleet.pool.workers),
        ]

    run(work())


def test_a_request_that_nobody_waits_for_any_more_ends(slow: Place) -> None:
    async def work() -> None:
        fleet = slow.fleet(slow.quick())
        await fleet.start(slow.path)
        waiting = asyncio.ensure_future(fleet.engine.generate(request(0, tokens=200)))
        await until(lambda: slow.events("begin"))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: fleet.pool.in_flight == 0)

    run(work())
