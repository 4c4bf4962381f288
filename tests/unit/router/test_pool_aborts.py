"""Requests of the pool that are aborted, wherever they are."""

from __future__ import annotations

import asyncio

from dovetail.router.balancer.commands import SWEEP_S
from dovetail.router.balancer.pool import Pool
from dovetail.types import FinishReason
from tests.unit.router.fakes import HeldEngine, ask, assert_idle, engines, run, settled


def test_an_abort_ends_what_waits_at_once_and_tells_engines_of_the_rest() -> None:
    async def main() -> None:
        pool = Pool(per_worker=1)
        (a,) = engines(pool, 1)
        tasks = [ask(pool, name) for name in "xyz"]
        await settled()
        await pool.abort(["x", "y"])
        assert a.aborted == [["x"]]
        x, y = [await task for task in tasks[:2]]
        assert (x.finish_reason, x.token_ids) == (FinishReason.ABORT, [7])
        assert (y.finish_reason, y.token_ids) == (FinishReason.ABORT, [])
        await settled()
        assert [asked.request.request_id for asked in a.asked] == ["z"]
        await pool.abort()
        assert (await tasks[2]).finish_reason is FinishReason.ABORT
        assert_idle(pool)

    run(main())


def test_an_abort_that_came_before_its_request_is_said_again() -> None:
    class Deaf(HeldEngine):
        deaf = True

        async def abort(self, request_ids=None):  # type: ignore[no-untyped-def]
            if self.deaf:
                self.deaf = False
            else:
                await super().abort(request_ids)

    async def main() -> None:
        pool = Pool()
        engine = Deaf("http://a:1")
        pool.add(engine)
        task = ask(pool, "x")
        await settled()
        await pool.abort()
        await settled()
        assert not task.done()
        await asyncio.sleep(SWEEP_S)
        assert (await task).finish_reason is FinishReason.ABORT
        assert engine.aborted == [["x"]]

    run(main())


def test_an_aborted_request_of_an_engine_that_dies_is_not_made_again() -> None:
    async def main() -> None:
        pool = Pool()
        a, b = engines(pool, 2)
        a.abort = b.abort = _nothing  # type: ignore[method-assign]
        task = ask(pool, "x")
        await settled()
        await pool.abort(["x"])
        pool.mark_dead(a.url, "killed")
        pool.mark_dead(b.url, "killed")
        assert (await task).finish_reason is FinishReason.ABORT
        assert_idle(pool)

    run(main())


async def _nothing(request_ids: object = None) -> None:
    pass


def test_ten_thousand_aborts_leave_nothing_behind() -> None:
    async def main() -> None:
        pool = Pool(per_worker=64, policy="cache_aware")
        made = engines(pool, 3)
        for batch in range(10):
            tasks = [
                ask(pool, f"{batch}.{i}", prompt=range(i % 50, i % 50 + 40), session=f"{i}")
                for i in range(1000)
            ]
            await settled(3)
            for i in range(0, 1000, 2):
                await pool.abort([f"{batch}.{i}"])
            pool.mark_dead(made[batch % 3].url, "killed")
            pool.mark_ready(made[batch % 3].url)
            await settled(5)
            await pool.abort()
            while pool.in_flight:
                await pool.abort()
                await settled()
            ended = {(await task).finish_reason for task in tasks}
            assert ended == {FinishReason.ABORT}
        assert_idle(pool)
        assert pool.stats.requests == 10_000
        assert not any(engine.asked for engine in made)
        await asyncio.sleep(2 * SWEEP_S)
        assert len(asyncio.all_tasks()) == 1
        assert not pool._dispatch._by_name and not pool._dispatch.calls and not pool._aborts._left
        await pool.close()

    run(main())
