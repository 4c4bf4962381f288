"""A fleet of engines: started, attached, looked after, given weights, and ended."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from dovetail.runtime import health
from dovetail.runtime.fleet import EngineSpec, Fleet
from dovetail.types import EngineError, GenerateResult
from dovetail.types.ports import Engine, EngineControl, ScoringEngine
from dovetail.weights.publish import publish
from tests.unit.runtime.places import (
    Place,
    connect,
    first_lines,
    lives,
    request,
    run,
    until,
    weights,
)


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
