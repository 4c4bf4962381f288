"""The pool of engines: who answers, what happens when engines go, and that nothing is left over."""

from __future__ import annotations

import asyncio

import pytest

from dovetail.router.balancer.dispatch import MOST_ATTEMPTS
from dovetail.router.balancer.pool import Pool
from dovetail.types import (
    EngineBusyError,
    EngineError,
    EngineGoneError,
    EngineTimeoutError,
    FinishReason,
    ScoreRequest,
)
from tests.unit.router.fakes import (
    HeldEngine,
    ScoringHeldEngine,
    ask,
    assert_idle,
    engines,
    request,
    run,
    settled,
    snapshot,
)


def test_requests_of_a_dead_engine_are_sent_to_another_one_and_counted_once() -> None:
    async def main() -> None:
        pool = Pool(policy="least_loaded")
        a, b = engines(pool, 2)
        tasks = [ask(pool, f"{i}") for i in range(4)]
        await settled()
        assert (len(a.asked), len(b.asked)) == (2, 2)
        pool.mark_dead(a.url, "killed")
        await settled()
        assert (len(a.asked), len(b.asked)) == (0, 4)
        for asked in list(b.asked):
            asked.finish("b")
        assert [(await task).text for task in tasks] == ["b"] * 4
        assert (pool.stats.answered, pool.stats.resent) == (4, 2)
        assert_idle(pool)

    run(main())


def test_a_late_answer_of_an_earlier_life_is_dropped() -> None:
    async def main() -> None:
        pool = Pool(policy="least_loaded")
        (a,) = engines(pool, 1)
        a.stubborn = True
        task = ask(pool, "x")
        await settled()
        zombie = a.asked[0]
        pool.mark_dead(a.url, "stopped")
        pool.mark_ready(a.url)
        zombie.finish("of the first life")
        await settled()
        assert not task.done()
        a.asked[0].finish("of the second life")
        assert (await task).text == "of the second life"
        assert (pool.stats.fenced, pool.stats.answered) == (1, 1)
        assert_idle(pool)

    run(main())


def test_a_failed_request_goes_to_an_engine_that_did_not_fail_it() -> None:
    async def main() -> None:
        pool = Pool(policy="least_loaded")
        a, b = engines(pool, 2)
        task = ask(pool, "x")
        await settled()
        first, second = (a, b) if a.asked else (b, a)
        first.asked[0].answer.set_exception(EngineGoneError("broke off"))
        await settled()
        assert not first.asked and len(second.asked) == 1
        second.asked[0].finish("well")
        assert (await task).text == "well"

    run(main())


def test_an_engine_that_fails_in_a_row_rests_and_is_tried_again_with_one_request() -> None:
    async def main() -> None:
        pool = Pool(failure_threshold=3)
        (a,) = engines(pool, 1)
        tasks = [ask(pool, f"{i}") for i in range(5)]
        await settled()
        for asked in list(a.asked):
            asked.answer.set_exception(EngineGoneError("broke off"))
        await settled()
        assert not a.asked
        assert pool.worker(a.url).breaker.state == "open"
        await asyncio.sleep(1.01)
        assert len(a.asked) == 1
        assert pool.worker(a.url).breaker.state == "half_open"
        a.asked[0].finish()
        await settled()
        assert pool.worker(a.url).breaker.state == "closed"
        assert len(a.asked) == 4
        for asked in list(a.asked):
            asked.finish()
        await asyncio.gather(*tasks)
        assert_idle(pool)

    run(main())


def test_what_an_engine_refuses_is_refused_and_not_tried_elsewhere() -> None:
    async def main() -> None:
        pool = Pool(policy="round_robin")
        a, b = engines(pool, 2)
        task = ask(pool, "x")
        await settled()
        a.asked[0].answer.set_exception(EngineError("no such sampling"))
        with pytest.raises(EngineError, match="no such sampling"):
            await task
        assert not b.asked
        assert pool.worker(a.url).breaker.state == "closed"
        assert_idle(pool)

    run(main())


def test_a_busy_engine_is_left_alone_for_as_long_as_it_asks() -> None:
    async def main() -> None:
        pool = Pool()
        (a,) = engines(pool, 1)
        task = ask(pool, "x")
        await settled()
        a.asked[0].answer.set_exception(EngineBusyError("later", retry_after_s=3.0))
        await settled()
        later = ask(pool, "y")
        await asyncio.sleep(2.9)
        assert not a.asked
        await asyncio.sleep(0.2)
        # What was sent before comes before what came later.
        assert [asked.request.request_id for asked in a.asked] == ["x", "y"]
        for asked in list(a.asked):
            asked.finish()
        await asyncio.gather(task, later)

    run(main())


def test_a_request_that_every_engine_breaks_off_ends_with_the_reason() -> None:
    async def main() -> None:
        pool = Pool(failure_threshold=1000)
        (a,) = engines(pool, 1)
        task = ask(pool, "poison")
        for _ in range(MOST_ATTEMPTS):
            while not a.asked:
                await asyncio.sleep(0.1)
            a.asked[0].answer.set_exception(EngineGoneError("segmentation fault"))
            await settled()
        with pytest.raises(EngineGoneError, match=r"sent 16 times .* segmentation fault"):
            await task
        assert_idle(pool)

    run(main())


def test_requests_wait_for_an_engine_until_one_is_back() -> None:
    async def main() -> None:
        pool = Pool(queue_size=2)
        (a,) = engines(pool, 1)
        pool.mark_dead(a.url, "killed")
        tasks = [ask(pool, "x"), ask(pool, "y")]
        await settled()
        with pytest.raises(EngineBusyError, match="2 requests wait") as refused:
            await pool.generate(request("z"))
        assert refused.value.retry_after_s > 0
        pool.mark_ready(a.url)
        await settled()
        for asked in list(a.asked):
            asked.finish()
        await asyncio.gather(*tasks)
        assert pool.stats.refused == 1
        assert_idle(pool)

    run(main())


def test_a_request_that_was_sent_before_is_not_refused_by_a_full_queue() -> None:
    async def main() -> None:
        pool = Pool(queue_size=1, per_worker=1)
        (a,) = engines(pool, 1)
        first, second = ask(pool, "first"), ask(pool, "second")
        await settled()
        pool.mark_dead(a.url, "killed")
        await settled()
        assert pool.waiting == 2
        pool.mark_ready(a.url)
        for name in ("first", "second"):
            await settled()
            assert a.asked[0].request.request_id == name
            a.asked[0].finish()
        await asyncio.gather(first, second)

    run(main())


def test_the_time_of_a_request_counts_waiting_and_sending_again() -> None:
    async def main() -> None:
        pool = Pool(request_timeout_s=60.0)
        (a,) = engines(pool, 1)
        started = asyncio.get_running_loop().time()
        task = ask(pool, "x")
        await settled()
        await asyncio.sleep(40)
        pool.mark_dead(a.url, "killed")
        with pytest.raises(EngineTimeoutError, match="no answer within 60 s, 1 attempts"):
            await task
        assert asyncio.get_running_loop().time() - started == pytest.approx(60, abs=0.1)
        assert_idle(pool)

    run(main())


def test_no_engine_gets_more_than_its_share_at_once() -> None:
    async def main() -> None:
        pool = Pool(per_worker=3)
        a, b = engines(pool, 2)
        tasks = [ask(pool, f"{i}") for i in range(20)]
        done = 0
        while done < 20:
            await settled()
            assert len(a.asked) <= 3 and len(b.asked) <= 3
            for engine in (a, b):
                if engine.asked:
                    engine.asked[0].finish()
                    done += 1
        await asyncio.gather(*tasks)
        assert_idle(pool)

    run(main())


def test_a_cancelled_caller_frees_its_slot_also_in_the_moment_when_it_got_it() -> None:
    async def main() -> None:
        pool = Pool(per_worker=1)
        (a,) = engines(pool, 1)
        first, second, third = (ask(pool, name) for name in "xyz")
        await settled()
        a.asked[0].finish()
        await first
        # Its slot is given by now, and its task has not run since.
        second.cancel()
        await settled()
        assert second.cancelled()
        assert [asked.request.request_id for asked in a.asked] == ["z"]
        third.cancel()
        await settled()
        assert_idle(pool)

    run(main())


def test_a_callers_own_timeout_is_not_taken_for_one_of_the_pools_reasons() -> None:
    async def main() -> None:
        pool = Pool()
        (a,) = engines(pool, 1)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1):
                await pool.generate(request("x"))
        assert not isinstance(caught.value, EngineError)
        task = ask(pool, "y")
        await settled()
        pool.mark_dead(a.url, "killed")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_idle(pool)

    run(main())


def test_a_removed_engine_finishes_what_it_has() -> None:
    async def main() -> None:
        pool = Pool(policy="least_loaded")
        a, b = engines(pool, 2)
        tasks = [ask(pool, name) for name in "xy"]
        await settled()
        leaving = asyncio.ensure_future(pool.remove(a.url))
        await settled()
        tasks.append(ask(pool, "z"))
        await settled()
        assert (len(a.asked), len(b.asked)) == (1, 2)
        assert not leaving.done()
        a.asked[0].finish("of a")
        assert await leaving is a
        assert not a.closed
        assert list(pool.workers) == [b.url]
        for asked in list(b.asked):
            asked.finish("of b")
        assert sorted([(await task).text for task in tasks]) == ["of a", "of b", "of b"]
        assert pool.stats.resent == 0

    run(main())


def test_what_a_removed_engine_does_not_finish_in_time_is_sent_elsewhere() -> None:
    async def main() -> None:
        pool = Pool(policy="least_loaded")
        a, b = engines(pool, 2)
        tasks = [ask(pool, name) for name in "xy"]
        await settled()
        await pool.remove(a.url, timeout_s=5)
        await settled()
        assert len(b.asked) == 2
        for asked in list(b.asked):
            asked.finish()
        await asyncio.gather(*tasks)

    run(main())


def test_twenty_engines_come_and_go_and_every_request_is_answered_once() -> None:
    async def main() -> None:
        pool = Pool(policy="least_loaded", per_worker=8)
        pool.add(HeldEngine("http://stays:1"))
        tasks = [ask(pool, f"{i}") for i in range(400)]
        answers = 0
        for turn in range(20):
            guest = HeldEngine(f"http://guest{turn}:1")
            pool.add(guest)
            await settled()
            for worker in list(pool.workers.values()):
                for asked in list(worker.engine.asked)[:6]:  # type: ignore[attr-defined]
                    asked.finish()
                    answers += 1
            await settled()
            await pool.remove(guest.url, drain=turn % 2 == 0, timeout_s=1)
        while any(not task.done() for task in tasks):
            await settled()
            for asked in list(pool.worker("http://stays:1").engine.asked):  # type: ignore[attr-defined]
                asked.finish()
                answers += 1
        await asyncio.gather(*tasks)
        assert answers == pool.stats.answered == 400
        assert_idle(pool)

    run(main())


def test_without_hope_for_an_engine_nobody_waits() -> None:
    async def main() -> None:
        pool = Pool(repaired=True)
        (a,) = engines(pool, 1)
        pool.mark_dead(a.url, "killed")
        task = ask(pool, "x")
        await settled()
        pool.give_up("no engine starts: out of memory")
        with pytest.raises(EngineGoneError, match="out of memory"):
            await task
        with pytest.raises(EngineGoneError, match="out of memory"):
            await pool.generate(request("y"))
        with pytest.raises(EngineError, match="out of memory"):
            await pool.load(snapshot(1))
        assert_idle(pool)

    run(main())


def test_closing_ends_every_request_with_abort() -> None:
    async def main() -> None:
        pool = Pool(per_worker=1)
        (a,) = engines(pool, 1)
        tasks = [ask(pool, name) for name in "xyz"]
        await settled()
        await pool.close()
        assert {(await task).finish_reason for task in tasks} == {FinishReason.ABORT}
        assert (await pool.generate(request("late"))).finish_reason is FinishReason.ABORT
        assert a.closed
        assert_idle(pool)

    run(main())


def test_scoring_goes_to_engines_that_score() -> None:
    async def main() -> None:
        pool = Pool(policy="round_robin")
        engines(pool, 2)
        ask_score = ScoreRequest("s", (1, 2, 3))
        with pytest.raises(EngineError, match="none of the engines scores"):
            await pool.score(ask_score)
        pool.add(ScoringHeldEngine("http://scores:1"))
        assert pool.can_score
        scores = await asyncio.gather(*(pool.score(ask_score) for _ in range(5)))
        assert [score.logprobs for score in scores] == [[-1.0, -1.0]] * 5

    run(main())


def test_an_address_is_in_the_pool_once() -> None:
    pool = Pool()
    pool.add(HeldEngine("http://a:1"))
    with pytest.raises(EngineError, match="already"):
        pool.add(HeldEngine("http://a:1"))
    with pytest.raises(EngineError, match="no engine at http://b:1; it has http://a:1"):
        pool.mark_dead("http://b:1", "never there")
