"""New weights in the pool of engines: nobody answers under those of another version."""

from __future__ import annotations

import asyncio

import pytest

from dovetail.router.balancer.pool import Pool
from dovetail.router.balancer.worker import Worker
from dovetail.types import EngineError
from tests.unit.router.fakes import HeldEngine, ask, engines, run, settled, snapshot


def test_an_answer_with_older_weights_than_the_engine_was_given_is_made_anew_elsewhere() -> None:
    async def main() -> None:
        told: list[tuple[str, str, str]] = []

        def on_failure(worker: Worker, error: Exception) -> None:
            told.append((worker.url, worker.state, str(error)))

        pool = Pool(policy="round_robin", on_failure=on_failure)
        a, b = engines(pool, 2)
        await pool.load(snapshot(5))
        task = ask(pool, "x")
        await settled()
        a.asked[0].finish("old", version=4)
        await settled()
        b.asked[0].finish("new", version=5)
        assert (await task).text == "new"
        message = "http://a:1 was given weights of version 5 and answered with those of version 4"
        assert told == [(a.url, "dead", message)]
        assert pool.stats.fenced == 1

    run(main())


def test_a_request_under_way_while_weights_come_keeps_its_answer() -> None:
    async def main() -> None:
        pool = Pool()
        (a,) = engines(pool, 1)
        await pool.load(snapshot(1))
        task = ask(pool, "x")
        await settled()
        await pool.pause()
        await pool.load(snapshot(2))
        await pool.resume()
        a.asked[0].finish("made with 1", version=1)
        assert (await task).text == "made with 1"

    run(main())


def test_nothing_is_sent_while_weights_are_on_their_way() -> None:
    async def main() -> None:
        pool = Pool()
        a, b = engines(pool, 2)
        await pool.pause()
        task = ask(pool, "x")
        await settled()
        assert not a.asked and not b.asked
        await pool.load(snapshot(3))
        await pool.resume()
        await settled()
        asked = (a.asked or b.asked)[0]
        asked.finish()
        await task
        assert a.said == b.said == ["pause", "load 3", "resume"]
        assert pool.weight_version == 3

    run(main())


def test_an_engine_that_fails_to_load_is_dead_and_the_others_go_on() -> None:
    async def main() -> None:
        told: list[str] = []
        pool = Pool(on_failure=lambda worker, error: told.append(f"{worker.url} {error}"))
        a, b = engines(pool, 2)
        a.failing = EngineError("disk full")
        await pool.pause()
        await pool.load(snapshot(1))
        await pool.resume()
        assert (pool.worker(a.url).state, pool.worker(b.url).state) == ("dead", "ready")
        assert told == ["http://a:1 disk full"]
        b.failing = EngineError("disk full")
        with pytest.raises(EngineError, match="no engine has the weights of version 2: disk full"):
            await pool.load(snapshot(2))

    run(main())


def test_a_load_ends_when_the_engine_that_it_waits_for_is_marked_dead() -> None:
    async def main() -> None:
        class Stuck(HeldEngine):
            async def load_snapshot(self, snapshot):  # type: ignore[no-untyped-def]
                await asyncio.Event().wait()

        pool = Pool()
        engines(pool, 1)
        pool.add(Stuck("http://stuck:1"))
        loading = asyncio.ensure_future(pool.load(snapshot(1)))
        await settled()
        assert not loading.done()
        pool.mark_dead("http://stuck:1", "does not react")
        await loading
        assert pool.worker("http://stuck:1").weight_version is None

    run(main())


def test_an_engine_that_comes_back_gets_the_last_weights_before_a_request() -> None:
    async def main() -> None:
        pool = Pool(repaired=True)
        (a,) = engines(pool, 1)
        pool.mark_dead(a.url, "killed")
        loading = asyncio.ensure_future(pool.load(snapshot(8)))
        task = ask(pool, "x")
        await settled()
        assert not loading.done()
        await pool.admit(a.url)
        await loading
        await settled()
        assert a.said == ["load 8", "resume"]
        a.asked[0].finish(version=8)
        await task
        assert pool.worker(a.url).weight_version == 8

    run(main())


def test_an_engine_that_died_while_everything_was_paused_does_not_stay_so() -> None:
    async def main() -> None:
        pool = Pool(repaired=True)
        a, b = engines(pool, 2)
        await pool.pause()
        a.failing = EngineError("disk full")
        await pool.load(snapshot(2))
        await pool.resume()
        a.failing = None
        await pool.admit(a.url)
        assert a.said == ["pause", "load 2", "resume"] and b.said == ["pause", "load 2", "resume"]

    run(main())


def test_an_engine_that_says_that_it_has_other_weights_is_not_admitted() -> None:
    async def main() -> None:
        class Liar(HeldEngine):
            async def weight_version(self):  # type: ignore[no-untyped-def]
                return 2

        pool = Pool(repaired=True)
        pool.add(Liar("http://liar:1"), ready=False)
        pool.snapshot = snapshot(3)
        with pytest.raises(EngineError, match="weights of version 3 and says that it has 2"):
            await pool.admit("http://liar:1")
        assert pool.worker("http://liar:1").state == "starting"

    run(main())
