"""The pool over the client of SGLang's form, and servers that fail on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dovetail.engines.launch import ClientSettings
from dovetail.engines.sglang.client import SglangEngine
from dovetail.router.balancer.pool import Pool
from dovetail.types import GenerateResult
from tests.faulty_engine import Fault, FaultyEngine, expected_ids
from tests.unit.router.fakes import request, snapshot

RATES = {
    Fault.DROP: 0.04,
    Fault.ERROR: 0.04,
    Fault.GARBAGE: 0.04,
    Fault.BAD_JSON: 0.04,
    Fault.SHORT: 0.04,
    Fault.BUSY: 0.04,
    Fault.DUPLICATE: 0.02,
    Fault.LATE_DUPLICATE: 0.02,
    Fault.DELAY: 0.04,
}


@asynccontextmanager
async def pool_over(*engines: FaultyEngine, **settings: object) -> AsyncIterator[Pool]:
    pool = Pool(**{"policy": "round_robin", "request_timeout_s": 60.0, **settings})  # type: ignore[arg-type]
    for engine in engines:
        pool.add(SglangEngine(engine.url, ClientSettings(4096)))
    try:
        yield pool
    finally:
        await pool.close()


def assert_right(result: GenerateResult, prompt: list[int]) -> None:
    assert result.token_ids == expected_ids(prompt)


@pytest.mark.parametrize("fault", [fault for fault in RATES if fault is not Fault.DELAY])
def test_one_fault_of_one_engine_is_another_engines_request(fault: Fault) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[fault]) as a,
            FaultyEngine() as b,
            pool_over(a, b) as pool,
        ):
            for number in range(4):
                result = await pool.generate(request(f"{number}", [number, 1]))
                assert_right(result, [number, 1])
            assert a.fired[fault] == 1
            assert pool.stats.answered == pool.stats.requests == 4

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_engine_that_answers_with_old_weights_is_dead_and_its_answer_dropped() -> None:
    async def main() -> None:
        async with FaultyEngine() as a, FaultyEngine() as b, pool_over(a, b) as pool:
            await pool.load(snapshot(3))
            assert (a.weight_version, b.weight_version) == (3, 3)
            a.script = [Fault.OLD_WEIGHTS]
            results = [await pool.generate(request(f"{i}", [i, 1])) for i in range(4)]
            assert [one.version_spans[-1].weight_version for one in results] == [3] * 4
            assert pool.worker(a.url).state == "dead"
            assert "was given weights of version 3" in pool.worker(a.url).reason
            assert pool.stats.fenced == 1
            await pool.admit(a.url)
            assert pool.worker(a.url).state == "ready"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_six_hundred_requests_through_faults_and_deaths_are_each_answered_rightly_once() -> None:
    async def main() -> None:
        engines = [FaultyEngine(rates=RATES, seed=seed, delay_s=0.02) for seed in range(3)]
        async with engines[0], engines[1], engines[2], pool_over(*engines) as pool:
            gate, answered = asyncio.Semaphore(24), 0

            async def one(number: int) -> None:
                nonlocal answered
                prompt = [number, number + 7, 3]
                async with gate:
                    result = await pool.generate(request(f"{number}", prompt))
                assert_right(result, prompt)
                answered += 1

            async def deaths() -> None:
                for turn in range(6):
                    await asyncio.sleep(0.15)
                    engine = engines[turn % 3]
                    await engine.stop()
                    pool.mark_dead(engine.url, "killed")
                    await engine.start()
                    await pool.admit(engine.url)

            await asyncio.gather(deaths(), *(one(number) for number in range(600)))
            assert answered == pool.stats.answered == pool.stats.requests == 600
            assert pool.in_flight == pool.waiting == 0
            assert all(not worker.in_flight for worker in pool.workers.values())
            assert sum(engine.fired[Fault.DROP] for engine in engines) > 0

    asyncio.run(asyncio.wait_for(main(), 120))
