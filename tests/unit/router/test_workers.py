"""The engines of a fleet over HTTP: told, added, removed, and what figures and middleware see."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dovetail.router.balancer.pool import Pool
from dovetail.router.bridge import Bridge
from dovetail.router.fields import RequestError
from dovetail.router.server import RouterServer
from dovetail.router.workers import Behind, allowed, worker_id
from dovetail.types import EngineError, FinishReason, GenerateResult, Snapshot
from dovetail.types.errors import BrokenUpdateError
from dovetail.types.ports import RemoteEngine
from dovetail.types.weights import Meeting
from tests.unit.router.fakes import HeldEngine, snapshot
from tests.unit.router.scripted import Client, Letters, Scripted, serving

A, B, NEW = "http://127.0.0.1:11", "http://127.0.0.1:12", "http://127.0.0.1:13"
BODY = {"text": "hi", "sampling_params": {"max_new_tokens": 2}}


class Fleet:
    """A pool of two engines of different dialects, so that nothing is passed on as it is."""

    def __init__(self) -> None:
        self.pool = Pool(policy="least_loaded")
        self.engines = {A: HeldEngine(A), B: HeldEngine(B, "vllm")}
        self.connected: list[tuple[str, str | None]] = []
        self.refusal: Exception | None = None

    async def connect(self, url: str, dialect: str | None) -> RemoteEngine:
        self.connected.append((url, dialect))
        if self.refusal is not None:
            raise self.refusal
        self.engines[url] = HeldEngine(url, dialect or "sglang")
        return self.engines[url]


def _run(work: Callable[[Client, Fleet], Awaitable[Any]], **settings: Any) -> Any:
    async def inside() -> Any:
        fleet = Fleet()
        for engine in fleet.engines.values():
            fleet.pool.add(engine)
        bridge = Bridge(lambda: fleet.pool, Letters, model="some/model")
        behind = Behind(fleet.pool, settings.pop("connect", fleet.connect))
        server = RouterServer(bridge, behind=behind, **settings)
        await server.serve_here()
        try:
            async with aiohttp.ClientSession() as session:
                return await work(Client(server, session), fleet)
        finally:
            await server.aclose()
            await fleet.pool.close()

    return asyncio.run(inside())


async def _delete(client: Client, path: str) -> tuple[int, Any]:
    url = aiohttp.client.URL(client.server.url + path, encoded=True)
    async with client.session.delete(url) as answer:
        return answer.status, await answer.json()


def test_engines_are_listed_in_every_routers_form() -> None:
    async def work(client: Client, fleet: Fleet) -> tuple[Any, Any, Any]:
        fleet.pool.mark_dead(B, "killed")
        (_, workers), (_, urls) = await client.get("/workers"), await client.get("/list_workers")
        _, one = await client.get(f"/workers/{worker_id(A)}")
        return workers, urls, one

    workers, urls, one = _run(work)
    assert urls == {"urls": [A, B]}
    assert workers["total"] == workers["stats"]["regular_count"] == 2
    alive, dead = workers["workers"]
    assert alive == one
    assert (alive["url"], alive["is_healthy"], alive["load"]) == (A, True, 0)
    assert (dead["is_healthy"], dead["state"], dead["reason"]) == (False, "dead", "killed")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/workers", {"url": NEW, "worker_type": "regular", "bootstrap_port": None}),
        (f"/add_worker?url={NEW}", None),
        ("/add_worker", {"worker_url": NEW}),
        ("/add_worker", {"url": f"{NEW}/"}),
        ("/workers", {"url": "127.0.0.1:13", "runtime": "vllm"}),
    ],
)
def test_an_engine_is_added_with_the_weights_of_the_others(path: str, body: Any) -> None:
    async def work(client: Client, fleet: Fleet) -> tuple[Any, Fleet]:
        await fleet.pool.load(snapshot(5))
        return await client.ok(path, body), fleet

    answer, fleet = _run(work)
    assert answer["status"] == "success"
    assert answer["worker_id"] == worker_id(NEW)
    assert set(answer["worker_urls"]) == {A, B, NEW}
    assert fleet.connected == [(NEW, (body or {}).get("runtime"))]
    assert fleet.pool.workers[NEW].ready
    assert fleet.engines[NEW].version == 5


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "http://HOST:PORT"),
        ({"url": 5}, 400, "a string"),
        ({"url": NEW, "worker_type": "prefill"}, 400, "'regular'"),
        ({"url": NEW, "wheel": 1}, 400, "no such field"),
        ({"url": A}, 409, "is there already"),
        ({"url": "http://169.254.169.254/"}, 400, "is no engine's"),
        ({"url": NEW, "priority": 1}, 502, "was not added: it is not one"),
    ],
)
def test_an_engine_that_can_not_be_added_is_refused_with_the_reason(
    body: dict[str, Any], status: int, said: str
) -> None:
    async def work(client: Client, fleet: Fleet) -> str:
        fleet.refusal = EngineError("it is not one")
        message = (await client.refused("/workers", body, status))["message"]
        assert set(fleet.pool.workers) == {A, B}
        return str(message)

    assert said in _run(work)


def test_an_engine_that_does_not_get_in_leaves_nothing_behind() -> None:
    class Deaf(HeldEngine):
        async def healthy(self, timeout_s: float) -> bool:
            return False

    class Late(HeldEngine):
        """Another one with its address is there before it answers."""

        async def healthy(self, timeout_s: float) -> bool:
            first.append(fleets[0].pool.add(HeldEngine(NEW)))
            return True

    class Full(HeldEngine):
        async def load_snapshot(self, snapshot: Any) -> None:
            raise EngineError("disk full")

    fleets: list[Fleet] = []
    first: list[Any] = []
    engines: list[HeldEngine] = [Deaf(NEW), Full(NEW), Late(NEW)]

    async def connect(url: str, dialect: str | None) -> RemoteEngine:
        return engines[len(said)]

    said: list[str] = []

    async def work(client: Client, fleet: Fleet) -> dict[str, Any]:
        fleets.append(fleet)
        await fleet.pool.load(snapshot(5))
        for _ in engines:
            said.append((await client.refused("/workers", {"url": NEW}, 502))["message"])
        return dict(fleet.pool.workers)

    workers = _run(work, connect=connect)
    assert all(engine.closed for engine in engines)
    assert workers.keys() == {A, B, NEW} and workers[NEW] is first[0]
    for words, message in zip(("does not react", "disk full", "already"), said, strict=True):
        assert words in message


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1:1",
        "gopher://127.0.0.1:1",
        "http://",
        "http://:80",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:1/generate",
        "http://127.0.0.1:1?a=b",
        "http://127.0.0.1:1#a",
        "http://user:secret@127.0.0.1:1",
        "http://127.0.0.1:1@169.254.169.254",
        "http://169.254.169.254",
        "http://169.254.170.2:80",
        "http://[fe80::1]:80",
        "http://[::ffff:169.254.169.254]:80",
        "http://[fd00:ec2::254]",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://0.0.0.0:80",
        "http://224.0.0.1:80",
        "http://[::]:80",
        "http://nobody.invalid:80",
    ],
)
def test_addresses_that_no_engine_has_are_refused(url: str) -> None:
    with pytest.raises(RequestError):
        asyncio.run(allowed(url))


@pytest.mark.parametrize("name", [worker_id(A), quote(A, safe=""), A])
def test_an_engine_is_removed_by_id_or_address(name: str) -> None:
    async def work(client: Client, fleet: Fleet) -> tuple[tuple[int, Any], Fleet]:
        return await _delete(client, f"/workers/{name}"), fleet

    (status, answer), fleet = _run(work)
    assert (status, answer["url"]) == (200, A)
    assert set(fleet.pool.workers) == {B}
    assert fleet.engines[A].closed


@pytest.mark.parametrize("path", [f"/remove_worker?url={A}", "/remove_worker"])
def test_older_routers_clients_remove_by_post(path: str) -> None:
    async def work(client: Client, fleet: Fleet) -> tuple[Any, Fleet]:
        return await client.ok(path, None if "?" in path else {"url": A}), fleet

    answer, fleet = _run(work)
    assert answer["success"] is True
    assert set(fleet.pool.workers) == {B}


def test_the_last_engine_is_not_removed() -> None:
    async def work(client: Client, fleet: Fleet) -> str:
        await client.ok("/remove_worker", {"url": B})
        said = (await client.refused("/remove_worker", {"url": A}, 409))["message"]
        assert set(fleet.pool.workers) == {A}
        return str(said)

    assert "add another one first" in _run(work)


def test_an_engine_that_leaves_in_a_pause_goes_on_alone() -> None:
    async def work(client: Client, fleet: Fleet) -> list[str]:
        await fleet.pool.pause()
        await client.ok("/remove_worker", {"url": A})
        await fleet.pool.resume()
        return fleet.engines[A].said

    assert _run(work) == ["pause", "resume"]


def test_an_engine_leaves_after_the_update_that_it_is_in() -> None:
    class Slow(HeldEngine):
        async def load_snapshot(self, snapshot: Any) -> None:
            begun.set()
            await go_on.wait()
            await super().load_snapshot(snapshot)

    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work(client: Client, fleet: Fleet) -> list[str]:
        slow = fleet.engines[NEW] = Slow(NEW)
        fleet.pool.add(slow)
        loading = asyncio.ensure_future(fleet.pool.load(snapshot(5)))
        await begun.wait()
        leaving = asyncio.ensure_future(client.ok("/remove_worker", {"url": NEW}))
        while fleet.pool.workers[NEW].ready:
            await asyncio.sleep(0.005)
        assert not leaving.done()
        go_on.set()
        await asyncio.gather(loading, leaving)
        assert set(fleet.pool.workers) == {A, B}
        return slow.said

    assert _run(work) == ["load 5"]


def test_an_engine_that_waits_for_weights_hand_to_hand_and_leaves_is_in_no_update() -> None:
    meeting = Meeting("broadcast", "127.0.0.1", 1, "m", 2, "gloo", patience_s=1.0)

    async def work(client: Client, fleet: Fleet) -> str:
        await fleet.pool.load(Snapshot(1, None, 1, meeting))
        refused = asyncio.ensure_future(client.refused("/add_worker", {"url": NEW}, 502))
        while fleet.pool.num_receivers < 3:
            await asyncio.sleep(0.005)
        await client.ok("/remove_worker", {"url": NEW})
        assert fleet.pool.num_receivers == 2
        await fleet.pool.load(Snapshot(2, None, 1, meeting))
        assert set(fleet.pool.workers) == {A, B}
        return str((await refused)["message"])

    assert "it was removed" in _run(work)


def test_an_update_announced_to_other_engines_than_are_there_breaks_off_at_once() -> None:
    meeting = Meeting("broadcast", "127.0.0.1", 1, "m", 3, "gloo", patience_s=1.0)

    async def work(client: Client, fleet: Fleet) -> None:
        with pytest.raises(BrokenUpdateError, match="announced to 3 engines; now there are 2"):
            await fleet.pool.load(Snapshot(1, None, 1, meeting))
        assert all(not engine.said for engine in fleet.engines.values())

    _run(work)


def test_an_engine_that_is_not_there_is_not_removed() -> None:
    async def work(client: Client, fleet: Fleet) -> list[int]:
        asked = [await _delete(client, path) for path in ("/workers/x", "/workers")]
        return [status for status, _ in asked]

    assert _run(work) == [404, 405]


def test_a_fleet_may_take_no_engines_from_outside() -> None:
    async def work(client: Client, fleet: Fleet) -> str:
        return str((await client.refused("/workers", {"url": NEW}, 501))["message"])

    assert "takes no engines from outside" in _run(work, connect=None)


def test_health_is_that_of_the_pool() -> None:
    async def work(client: Client, fleet: Fleet) -> list[int]:
        found = [(await client.get("/health"))[0]]
        for url in (A, B):
            fleet.pool.mark_dead(url, "killed")
            found.append((await client.get("/health"))[0])
        return found

    assert _run(work) == [200, 200, 503]


def test_middleware_sees_the_engines_as_they_are() -> None:
    seen: list[Any] = []

    class Looks:
        def __init__(self, app: Any, *, router: Any) -> None:
            self.router = router

        async def dispatch(self, request: Any, call_next: Any) -> Any:
            router = self.router
            seen.append(
                (router.worker_request_counts, router.dead_workers, router.max_weight_version)
            )
            return await call_next(request)

    async def work(client: Client, fleet: Fleet) -> None:
        await fleet.pool.load(snapshot(5))
        fleet.pool.mark_dead(B, "killed")
        await client.get("/health")

    _run(work, middleware=[lambda app, router: Looks(app, router=router)])
    assert seen == [({A: 0, B: 0}, {B}, 5)]


def _values(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (
            sample.name.removeprefix("dovetail_router_"),
            tuple(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_figures_tell_requests_tokens_engines_and_weights() -> None:
    async def work(client: Client, fleet: Fleet) -> str:
        await fleet.pool.load(snapshot(5))
        fleet.pool.mark_dead(B, "killed")
        waiting = asyncio.ensure_future(client.ok("/v1/completions", {"prompt": "hi"}))
        while not fleet.engines[A].asked:
            await asyncio.sleep(0.005)
        (asked,) = fleet.engines[A].asked
        result = GenerateResult("x", [97, 98], [-1.0, -1.0], FinishReason.STOP, prompt_tokens=2)
        asked.answer.set_result(result)
        await waiting
        await client.post("/nowhere", {})
        return str((await client.get("/metrics"))[1])

    values = _values(_run(work))
    assert values["requests_total", ("POST", "/v1/completions", "200")] == 1
    assert values["requests_total", ("POST", "other", "404")] == 1
    assert values["request_seconds_count", ("/v1/completions",)] == 1
    assert values["generated_tokens_total", ()] == 2
    assert values["prompt_tokens_total", ()] == 2
    assert values["queue", ()] == 0
    assert values["worker_state", ("ready", A)] == values["worker_state", ("dead", B)] == 1
    assert values["worker_weight_version", (A,)] == values["weight_version", ()] == 5


def test_figures_before_one_engine() -> None:
    async def work() -> str:
        async with serving(Scripted()) as client:
            await client.ok("/generate", BODY)
            return str((await client.get("/metrics"))[1])

    values = _values(asyncio.run(work()))
    assert values["requests_total", ("POST", "/generate", "200")] == 1
    assert values["generated_tokens_total", ()] == 2
    assert values["weight_version", ()] == 7


def test_text_becomes_tokens_and_tokens_text_in_both_forms() -> None:
    async def work() -> list[Any]:
        async with serving(Scripted()) as client:
            messages = [{"role": "user", "content": "a"}]
            return [
                await client.ok("/tokenize", {"prompt": "hi", "return_token_strs": True}),
                await client.ok("/v1/tokenize", {"model": "m", "prompt": ["hi", "a"]}),
                await client.ok("/tokenize", {"messages": messages}),
                await client.ok("/detokenize", {"tokens": [104, 105]}),
                await client.ok("/detokenize", {"tokens": [[104], [105, 1]]}),
                await client.refused("/detokenize", {"tokens": [999]}),
            ]

    text, several, chat, back, backs, wrong = asyncio.run(work())
    assert text == {
        "count": 2,
        "tokens": [104, 105],
        "max_model_len": 64,
        "token_strs": ["h", "i"],
    }
    assert (several["count"], several["tokens"]) == ([2, 1], [[104, 105], [97]])
    assert "".join(map(chr, chat["tokens"])) == "u:a;a:"
    assert back == {"prompt": "hi", "text": "hi"}
    assert backs["text"] == ["h", "i<eos>"]
    assert wrong["param"] == "tokens"
