"""Requests in the engines' own form, over sockets, with engines that fail on purpose."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import uvloop

from dovetail.router.balancer.proxy import _names
from tests.faulty_engine import Fault, FaultyEngine, expected_ids
from tests.unit.router.fronts import PROMPT, Run, Stub, assert_right, front

ONE_FAULT = [fault for fault in Fault if fault not in (Fault.NONE, Fault.HANG, Fault.REFUSE)]


def test_bytes_go_on_and_come_back_as_they_are(run: Run) -> None:
    async def main() -> None:
        async with FaultyEngine() as engine, front(engine) as router:
            raw = b' {"input_ids": [5,6,7],  "odd field": 1.0e+00}\n'
            url = f"{router.url}/generate?x=%20y"
            headers = {"X-SMG-Routing-Key": "s", "content-type": "application/json"}
            async with router.http.post(url, data=raw, headers=headers) as reply:
                assert reply.status == 200
                direct = await router.http.post(f"{engine.url}/generate", data=raw)
                assert await reply.read() == await direct.read()
            seen = engine.headers[0]
            assert seen["x-smg-routing-key"] == "s"
            assert seen["content-length"] == str(len(raw))
            assert seen["host"] == engine.url.removeprefix("http://")
            assert engine.requests[0] == json.loads(raw)

    run(main())


def test_connections_to_an_engine_are_used_again(run: Run) -> None:
    async def main() -> None:
        opened = 0

        class Counted(FaultyEngine):
            async def _connected(self, reader: Any, writer: Any) -> None:
                nonlocal opened
                opened += 1
                await super()._connected(reader, writer)

        async with Counted() as engine, front(engine) as router:
            for _ in range(10):
                await router.generate()
            assert opened == 1
            await asyncio.gather(*(router.generate() for _ in range(20)))
            assert opened <= 20

    run(main())


@pytest.mark.parametrize("fault", ONE_FAULT)
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_an_engine_does_the_client_gets_one_right_answer(
    run: Run, fault: Fault, stream: bool
) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[fault]) as a,
            FaultyEngine(script=[fault]) as b,
            front(a, b) as router,
        ):
            for _ in range(3):
                if not stream:
                    status, body = await router.generate()
                    assert status == 200
                    assert_right(body)
                elif fault is not Fault.DIE_MID_STREAM:
                    assert_right((await router.stream(rid="r"))[-1])
            if not (stream and fault is Fault.DIE_MID_STREAM):
                assert a.fired[fault] + b.fired[fault] >= 1
                assert router.pool.stats.answered == 3
            assert router.pool.in_flight == 0

    run(main())


def test_a_stream_that_breaks_off_ends_with_an_event_that_says_so(run: Run) -> None:
    async def main() -> None:
        async with FaultyEngine(script=[Fault.DIE_MID_STREAM]) as engine, front(engine) as router:
            first, last = await router.stream(rid="r")
            assert first["output_ids"] == expected_ids(PROMPT)[:1]
            assert last["error"]["code"] == 503
            assert "a part of the answer was passed on already" in last["error"]["message"]
            assert_right((await router.stream(rid="r"))[-1])
            assert len(engine.requests) == 2

    run(main())


def test_events_come_as_the_engine_makes_them(run: Run) -> None:
    async def main() -> None:
        async with FaultyEngine(tick_s=0.2) as engine, front(engine) as router:
            body = {"input_ids": PROMPT, "stream": True}
            async with router.http.post(f"{router.url}/generate", json=body) as reply:
                first = await reply.content.readuntil(b"\n\n")
                assert json.loads(first.removeprefix(b"data: "))["output_ids"]
                assert engine.answered == 0
                assert (await reply.read()).endswith(b"data: [DONE]\n\n")

    run(main())


def test_what_an_engine_refuses_reaches_the_client_as_it_is(run: Run) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[Fault.REFUSE]) as a,
            FaultyEngine(script=[Fault.REFUSE]) as b,
            front(a, b) as router,
        ):
            status, body = await router.generate()
            assert (status, body["error"]["message"]) == (400, "no such sampling")
            assert len(a.requests) + len(b.requests) == 1

    run(main())


def test_requests_of_an_engine_that_is_marked_dead_go_elsewhere(run: Run) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[Fault.HANG] * 4) as a,
            FaultyEngine() as b,
            front(a, b) as router,
        ):
            asking = [asyncio.ensure_future(router.generate()) for _ in range(8)]
            while len(a.requests) < 4:
                await asyncio.sleep(0.01)
            router.pool.mark_dead(a.url, "does not react")
            for status, body in await asyncio.gather(*asking):
                assert status == 200
                assert_right(body)
            while a.left < 4:
                await asyncio.sleep(0.01)
            assert router.pool.stats.answered == 8

    run(main())


def test_an_engine_that_restarts_on_its_port_is_found_again(run: Run) -> None:
    async def main() -> None:
        async with FaultyEngine() as engine, front(engine) as router:
            await router.generate()
            await engine.stop()
            asking = asyncio.ensure_future(router.generate())
            await asyncio.sleep(0.1)
            assert not asking.done()
            await engine.start()
            status, body = await asking
            assert status == 200
            assert_right(body)

    run(main())


def test_a_long_body_is_passed_on_while_it_comes(run: Run) -> None:
    async def main() -> None:
        prompt = list(range(2_000_000))
        async with FaultyEngine() as engine, front(engine) as router:
            status, body = await router.generate(input_ids=prompt)
            assert status == 200
            assert body["output_ids"] == expected_ids(prompt)

    run(main())


def test_a_full_queue_is_said_with_429_and_a_time_to_come_again(run: Run) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[Fault.HANG]) as engine,
            front(engine, per_worker=1, queue_size=0) as router,
        ):
            first = asyncio.ensure_future(router.generate())
            while not engine.requests:
                await asyncio.sleep(0.01)
            body = {"input_ids": PROMPT}
            async with router.http.post(f"{router.url}/generate", json=body) as reply:
                assert reply.status == 429
                assert int(reply.headers["retry-after"]) >= 1
            first.cancel()

    run(main())


def test_without_an_answer_in_time_the_client_gets_504(run: Run) -> None:
    async def main() -> None:
        async with (
            FaultyEngine(script=[Fault.HANG]) as engine,
            front(engine, request_timeout_s=0.3) as router,
        ):
            status, body = await router.generate()
            assert status == 504
            assert "no answer within 0.3 s" in body["error"]["message"]
            assert router.pool.worker(engine.url).in_flight == 0

    run(main())


def test_only_what_every_engine_speaks_is_passed_on(run: Run) -> None:
    async def main() -> None:
        async with (
            FaultyEngine("sglang") as a,
            FaultyEngine("vllm") as b,
            front(a) as router,
        ):
            assert (await router.generate())[0] == 200
            assert len(a.requests) == 1
            router.pool.add(Stub(b.url, "vllm"))  # type: ignore[arg-type]
            # Answered by the engine behind the bridge: the two have no form in common.
            status, body = await router.generate(sampling_params={"max_new_tokens": 2})
            assert (status, body["text"]) == (200, "ab")
            assert len(a.requests) == 1 and not b.requests
            await router.pool.remove(a.url)
            body = {"prompt": PROMPT, "model": "m"}
            async with router.http.post(f"{router.url}/v1/completions", json=body) as reply:
                assert (await reply.json())["choices"][0]["token_ids"] == expected_ids(PROMPT)

    run(main())


def test_an_engines_own_token_takes_the_place_of_the_clients(run: Run) -> None:
    async def main() -> None:
        async with FaultyEngine() as engine, front(engine) as router:
            body = {"input_ids": PROMPT}
            for token, seen in ((None, "bearer clients"), ("engines", "bearer engines")):
                router.pool.worker(engine.url).engine.token = token  # type: ignore[attr-defined]
                headers = {"authorization": "Bearer clients"}
                await router.http.post(f"{router.url}/generate", json=body, headers=headers)
                assert engine.headers[-1]["authorization"] == seen

    run(main())


@pytest.mark.parametrize(
    ("answer", "is_its_own"),
    [
        (b'{"output_ids":[183,18],"meta_info":{"id":"18","weight_version":"3"}}', True),
        (b'{"output_ids": [7], "meta_info": {"id": "18"}}', True),
        (b'[{"output_ids":[7],"meta_info":{"id":"18_0"}}]', True),
        (b'{"output_ids":[183,18],"meta_info":{"id":"17","weight_version":"18"}}', False),
        (b'{"output_ids":[18],"meta_info":{"id":"181"}}', False),
    ],
)
def test_an_answer_is_a_requests_own_by_its_id_alone(answer: bytes, is_its_own: bool) -> None:
    assert _names(answer, b"18") is is_its_own


def test_a_thousand_requests_through_faulty_engines_are_each_answered_rightly_once() -> None:
    rates = {
        Fault.DROP: 0.03,
        Fault.ERROR: 0.03,
        Fault.GARBAGE: 0.03,
        Fault.BAD_JSON: 0.03,
        Fault.SHORT: 0.03,
        Fault.DUPLICATE: 0.03,
        Fault.LATE_DUPLICATE: 0.02,
        Fault.BUSY: 0.03,
        Fault.DELAY: 0.03,
    }

    async def main() -> None:
        engines = [FaultyEngine(rates=rates, seed=seed, delay_s=0.02) for seed in range(3)]
        async with engines[0], engines[1], engines[2], front(*engines) as router:
            gate = asyncio.Semaphore(32)

            async def one(number: int) -> None:
                prompt = [number, 2 * number + 1, 3]
                async with gate:
                    status, body = await router.generate(input_ids=prompt, rid=f"{number}")
                assert status == 200, body
                assert body["output_ids"] == expected_ids(prompt)
                assert body["meta_info"]["id"] == f"{number}"

            await asyncio.gather(*(one(number) for number in range(1000)))
            stats = router.pool.stats
            assert (stats.requests, stats.answered) == (1000, 1000)
            assert all(sum(engine.fired[fault] for engine in engines) for fault in rates)
            assert stats.resent > 0
            assert all(not worker.in_flight for worker in router.pool.workers.values())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 120))
