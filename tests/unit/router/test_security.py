"""Who is let in: by address, by name, by origin, by token; and that the token is nowhere to be
read."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.routing import Route

from dovetail.compat.modules.http import post
from dovetail.config.sections.router import RouterConfig
from dovetail.router.known import headers_for
from dovetail.router.security import OPEN_PATHS, Access
from dovetail.types import ConfigError
from tests.unit.router.scripted import Client, Scripted, serving

TOKEN = "canary-5f1e9c"
BODY = {"text": "hi", "sampling_params": {"max_new_tokens": 2}}


async def _ask(client: Client, method: str, path: str, **headers: str) -> tuple[int, str]:
    url = client.server.url + path
    async with client.session.request(method, url, json={}, headers=headers) as got:
        return got.status, await got.text()


def _paths(client: Client) -> list[tuple[str, str]]:
    """Every route, with every method that it takes."""
    found = []
    for route in client.server.app.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{id:path}", "x").replace("{id}", "x")
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def test_without_the_token_every_route_but_health_is_closed() -> None:
    async def work() -> tuple[list[str], list[str], int]:
        engine = Scripted()
        async with serving(engine, access=Access(token=TOKEN)) as client:
            paths = _paths(client)
            let_in = []
            for method, path in paths:
                for headers in ({}, {"Authorization": "Bearer other"}, {"X-Api-Key": TOKEN}):
                    status, _ = await _ask(client, method, path, **headers)
                    if status != 401:
                        let_in.append(f"{method} {path}")
            assert engine.requests == []
            status, _ = await _ask(client, "DELETE", "/nowhere")
            return let_in, [f"{method} {path}" for method, path in paths], status

    let_in, all_paths, unknown = asyncio.run(work())
    assert set(let_in) == {f"{m} {path}" for m in ("GET", "HEAD") for path in OPEN_PATHS}
    assert {"POST /generate", "POST /abort_request", "DELETE /workers/x"} <= set(all_paths)
    assert unknown == 401


def test_with_the_token_everything_is_as_without_one() -> None:
    async def work() -> list[int]:
        async with serving(Scripted(), access=Access(token=TOKEN)) as client:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            answers = [await client.post("/generate", BODY, headers=headers)]
            return [status for status, _ in answers]

    assert asyncio.run(work()) == [200]


def test_posts_of_the_slime_familys_helper_send_the_token_to_this_server_alone() -> None:
    async def work() -> tuple[Any, dict[str, str], str]:
        async with serving(Scripted(), access=Access(token=TOKEN)) as client:
            url = client.server.url
            return await post(f"{url}/generate", BODY), headers_for("http://other:1"), url

    answer, elsewhere, url = asyncio.run(work())
    assert answer["text"] == "ab"
    assert elsewhere == headers_for(url) == {}


def test_the_token_reaches_neither_functions_nor_logs_nor_answers(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    class Reads:
        def __init__(self, app: Any, *, router: Any) -> None:
            seen.append(repr(vars(router)))

        async def dispatch(self, request: Any, call_next: Any) -> Any:
            seen.append(repr(request.headers.items()))
            return await call_next(request)

    async def work() -> None:
        engine = Scripted()
        access = Access(token=TOKEN)
        made = [lambda app, router: Reads(app, router=router)]
        async with serving(engine, access=access, middleware=made) as client:
            seen.append(repr(access))
            engine.failure = RuntimeError("broken")
            for value in (f"Bearer {TOKEN}", f"Bearer {TOKEN}x", TOKEN):
                headers = {"Authorization": value}
                seen.append(repr(await client.post("/generate", BODY, headers=headers)))
                seen.append(repr(await _ask(client, "GET", "/metrics", **headers)))

    with caplog.at_level(logging.DEBUG):
        asyncio.run(work())
    captured = capfd.readouterr()
    everything = "".join([*seen, caplog.text, captured.out, captured.err])
    assert "broken" in everything
    assert TOKEN not in everything


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_other_machines_are_not_served_without_a_token(host: str) -> None:
    with pytest.raises(ConfigError, match="--router-token-env"):
        Access(host)
    assert Access(host, TOKEN).host == host


def test_a_token_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RouterConfig(router_token_env="ROUTER_TOKEN")
    with pytest.raises(ConfigError, match="ROUTER_TOKEN, which is not set or empty"):
        Access.of(config)
    monkeypatch.setenv("ROUTER_TOKEN", TOKEN)
    assert Access.of(config).token == TOKEN
    monkeypatch.setenv("ROUTER_TOKEN", "two\nlines")
    with pytest.raises(ConfigError, match="no header holds"):
        Access.of(config)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "attacker.example"}, 400),
        ({"Host": "127.0.0.1.attacker.example"}, 400),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_pages_in_a_browser_and_foreign_names_are_refused(
    headers: dict[str, str], status: int
) -> None:
    async def work() -> list[int]:
        async with serving(Scripted()) as client:
            got = [(await client.post("/generate", BODY, headers=headers))[0]]
            own = {**headers, "Content-Type": "text/plain"}
            url = f"{client.server.url}/abort_request"
            for method in ("POST", "DELETE"):
                async with client.session.request(method, url, data=b"{}", headers=own) as answer:
                    got.append(answer.status)
            return got

    generated, posted, deleted = asyncio.run(work())
    assert (generated, posted) == (status, status)
    assert deleted == (405 if status == 200 else status)


def test_an_own_page_is_let_in() -> None:
    async def work() -> int:
        async with serving(Scripted()) as client:
            headers = {"Origin": client.server.url, "Sec-Fetch-Site": "same-origin"}
            return (await client.post("/generate", BODY, headers=headers))[0]

    assert asyncio.run(work()) == 200
