"""What is not generation: information, loads, aborts, refusals, clients that go, loops that stand
still or are blocked, and how a server ends."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from dovetail.router import crossing
from dovetail.router.bridge import Bridge
from dovetail.router.server import RouterServer
from dovetail.types import ConfigError
from tests.unit.router.scripted import Letters, Scripted, serving

BODY = {"text": "hi", "sampling_params": {"max_new_tokens": 8}}


def _get(*paths: str) -> list[tuple[int, Any]]:
    async def work() -> list[tuple[int, Any]]:
        async with serving(Scripted()) as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(work())


def test_health_and_cache() -> None:
    found = _get("/health", "/health_generate", "/ping", "/flush_cache")
    assert [status for status, _ in found] == [200] * 4


def test_what_is_served() -> None:
    (_, models), (_, info), (_, same), (_, server), (_, version) = _get(
        "/v1/models", "/get_model_info", "/model_info", "/server_info", "/get_weight_version"
    )
    assert models["data"][0]["id"] == "some/model"
    assert models["data"][0]["max_model_len"] == 64
    assert info == same
    assert info["model_path"] == "some/model"
    assert info["is_generation"] is True
    assert server["weight_version"] == info["weight_version"] == "7"
    assert version == {"weight_version": "7"}


def test_the_one_worker_has_this_address() -> None:
    async def work() -> tuple[Any, Any, str]:
        async with serving(Scripted()) as client:
            _, workers = await client.get("/workers")
            _, urls = await client.get("/list_workers")
            return workers, urls, client.server.url

    workers, urls, url = asyncio.run(work())
    assert [worker["url"] for worker in workers["workers"]] == [url]
    assert urls == {"urls": [url]}


def test_loads_count_what_is_under_way() -> None:
    engine = Scripted()

    async def work() -> tuple[Any, Any, tuple[int, Any]]:
        engine.held = asyncio.Event()
        async with serving(engine) as client:
            waiting = asyncio.ensure_future(client.ok("/generate", BODY | {"rid": "mine"}))
            await client.until(1)
            _, loads = await client.get("/v1/loads?include=core")
            _, load = await client.get("/load?include_inflight=true&inflight_limit=100")
            flushed = await client.get("/flush_cache")
            engine.held.set()
            await waiting
            return loads, load, flushed

    loads, load, flushed = asyncio.run(work())
    assert loads["loads"][0]["num_running_reqs"] == 1
    assert loads["aggregate"]["total_reqs"] == 1
    assert load == {"server_load": 1, "inflight": ["mine"], "num_inflight": 1}
    assert flushed[0] == 400


@pytest.mark.parametrize(
    ("path", "body"), [("/abort_request", {"abort_all": True}), ("/abort_requests", {})]
)
def test_everything_can_be_aborted(path: str, body: dict[str, Any]) -> None:
    engine = Scripted()

    async def work() -> list[Any]:
        engine.held = asyncio.Event()
        async with serving(engine) as client:
            waiting = [asyncio.ensure_future(client.ok("/generate", BODY)) for _ in range(3)]
            await client.until(3)
            assert (await client.ok(path, body))["aborted"] == 3
            return await asyncio.gather(*waiting)

    answers = asyncio.run(work())
    assert engine.aborted is None
    assert [one["meta_info"]["finish_reason"]["type"] for one in answers] == ["abort"] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(stream: bool) -> None:
    engine = Scripted()

    async def work() -> None:
        engine.held = asyncio.Event()
        async with serving(engine) as client:
            waiting = asyncio.ensure_future(client.ok("/generate", BODY | {"stream": stream}))
            await client.until(1)
            waiting.cancel()
            await client.until(0)
            while not engine.cancelled:
                await asyncio.sleep(0.005)

    asyncio.run(work())
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("post", "/update_weights_from_tensor", 501, "the run itself gives its engine new weights"),
        ("post", "/release_memory_occupation", 501, "pauses it"),
        ("post", "/workers", 501, "one engine"),
        ("post", "/v1/embeddings", 501, "does not embed"),
        ("post", "/generat", 404, "no such path"),
        ("get", "/generate", 405, "the method GET is not for this path"),
    ],
)
def test_what_is_not_to_be_had_says_why(method: str, path: str, status: int, said: str) -> None:
    async def work() -> tuple[int, Any]:
        async with serving(Scripted()) as client:
            return await (client.post(path, {}) if method == "post" else client.get(path))

    got, content = asyncio.run(work())
    assert got == status
    assert said in content["error"]["message"]


def test_a_body_that_is_no_json_object_is_refused() -> None:
    async def work() -> list[tuple[int, Any]]:
        async with serving(Scripted()) as client:
            found = []
            for data in (b"{", b"[1]", b'{"text": NaN}'):
                async with client.session.post(f"{client.server.url}/generate", data=data) as got:
                    found.append((got.status, await got.json()))
            return found

    found = asyncio.run(work())
    assert [status for status, _ in found] == [400] * 3
    assert [content["error"]["param"] for _, content in found] == ["body"] * 3


def test_another_host_name_is_refused() -> None:
    async def work() -> int:
        async with serving(Scripted()) as client:
            headers = {"Host": "attacker.example"}
            return (await client.post("/generate", BODY, headers=headers))[0]

    assert asyncio.run(work()) == 400


def test_only_this_machine_is_served() -> None:
    async def work() -> str:
        async with serving(Scripted()) as client:
            return str(client.server._socket.getsockname()[0])

    assert asyncio.run(work()) == "127.0.0.1"


def test_a_port_that_is_taken_is_an_error_with_the_cure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"router_port {port} .*--router-port"):
            RouterServer(_bridge(Scripted()), port)


def test_an_asked_port_is_taken() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = RouterServer(_bridge(Scripted()), port)
    assert server.url == f"http://127.0.0.1:{port}"
    server.close()


def test_a_request_waits_while_the_run_trains() -> None:
    """The run's loop stands still between two rollouts; what comes then is answered in the next."""
    server, runner, answers = RouterServer(_bridge(Scripted())), asyncio.Runner(), []
    server.start(runner.get_loop())
    try:
        client = threading.Thread(target=lambda: answers.append(_post(server.url, BODY)))
        client.start()
        time.sleep(0.3)
        assert answers == []
        runner.run(_until(lambda: bool(answers)))
        assert answers[0]["text"] == "abcdefgh"
        client.join()
    finally:
        server.close()
        runner.close()


def test_a_loop_that_somebody_blocks_is_an_error_with_the_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crossing, "BLOCKED_AFTER_S", 0.5)
    answers: list[dict[str, Any]] = []

    async def work() -> None:
        async with serving(Scripted()) as client:
            try:
                _post(client.server.url, BODY)
            except urllib.error.HTTPError as error:
                answers.append({"status": error.code, **json.loads(error.read())})

    asyncio.run(work())
    assert answers[0]["status"] == 503
    assert "test_server.py" in answers[0]["message"]
    assert "urlopen(request" in answers[0]["message"]


def test_closing_ends_what_is_under_way_at_once() -> None:
    engine = Scripted()

    async def work() -> tuple[int, Any, float]:
        engine.held = asyncio.Event()
        async with serving(engine) as client:
            waiting = asyncio.ensure_future(client.post("/generate", BODY))
            await client.until(1)
            started = time.perf_counter()
            await asyncio.to_thread(client.server.close)
            took = time.perf_counter() - started
            return *await waiting, took

    status, content, took = asyncio.run(work())
    assert status == 503
    assert "the run ended" in content["message"]
    assert took < 3


def test_closing_when_the_runs_loop_is_gone_does_not_hang() -> None:
    engine = Scripted()
    engine.held = asyncio.Event()
    server, runner = RouterServer(_bridge(engine)), asyncio.Runner()
    server.start(runner.get_loop())
    failed: list[int] = []

    def ask() -> None:
        try:
            _post(server.url, BODY)
        except urllib.error.HTTPError as error:
            failed.append(error.code)

    client = threading.Thread(target=ask)
    client.start()
    runner.run(_until(lambda: bool(engine.requests)))
    runner.close()
    started = time.perf_counter()
    server.close()
    client.join(5)
    assert time.perf_counter() - started < 4
    assert failed == [503]


def test_a_server_that_was_never_started_gives_its_port_back() -> None:
    server = RouterServer(_bridge(Scripted()))
    server.close()
    again = RouterServer(_bridge(Scripted()), server.port)
    again.close()


def _bridge(engine: Scripted) -> Bridge:
    return Bridge(lambda: engine, Letters, model="some/model")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as response:
        return dict(json.loads(response.read()))


async def _until(done: Any) -> None:
    while not done():
        await asyncio.sleep(0.005)
