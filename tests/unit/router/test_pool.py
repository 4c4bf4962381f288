"""The pool of engines: who answers, what happens when engines go, and that nothing is left over."""

from __future__ import annotations

import asyncio

import pytest

from dovetail.router.balancer.commands import SWEEP_S
from dovetail.router.balancer.dispatch import MOST_ATTEMPTS
from dovetail.router.balancer.pool import Pool
from dovetail.router.balancer.worker import Worker
from dovetail.types import (
    EngineBusyError,
    EngineError,
    EngineGoneError,
    EngineTimeoutError,
    FinishReason,
    GenerateResult,
    ScoreRequest,
)
from tests.unit.router.fakes import (
    HeldEngine,
    ScoringHeldEngine,
    request,
    run,
    settled,
    snapshot,
)


def ask(pool: Pool, name: str, **of_request: object) -> asyncio.Task[GenerateResult]:
    return asyncio.get_running_loop().create_task(
        pool.generate(request(name, **of_request))  # type: ignore[arg-type]
    )


def engines(pool: Pool, count: int) -> list[HeldEngine]:
    made = [HeldEngine(f"http://{name}:1") for name in "abcdef"[:count]]
    for engine in made:
        pool.add(engine)
    return made


def assert_idle(pool: Pool) -> None:
    assert pool.in_flight == pool.waiting == 0
    assert all(not worker.in_flight and not worker.calls for worker in pool.workers.values())


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
