"""The description of the server, and requests made up from it: whatever comes, the answer is one
that is described, and it comes."""

from __future__ import annotations

import asyncio
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema_rs import validator_for
from starlette.routing import BaseRoute, Route

from dovetail.router import worker_control
from dovetail.router.app import make_app
from dovetail.router.bridge import Bridge
from dovetail.router.describe import NOT_HERE, description_of
from dovetail.router.limits import Limits
from dovetail.router.openapi import document
from dovetail.router.security import Access
from dovetail.router.server import RouterServer
from dovetail.router.sessions.server import SessionServer
from dovetail.types import EngineError
from tests.unit.router.scripted import CONTEXT, VOCAB, Letters, Scoring

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.generation import GenerationMode

_EXAMPLES, _OF_ALIASES = 10, 1
_TIMEOUT_S = 15


class Obeying:
    """An engine that is steered, without one. A directory is read whose name has an a."""

    def __init__(self) -> None:
        self.weight_version = 0

    async def load_weights(self, directory: Path, version: int | None) -> int:
        if "a" not in directory.name:
            raise EngineError(f"no weights in {directory}")
        await self.set_weight_version(self.weight_version + 1 if version is None else version)
        return 0

    async def set_weight_version(self, version: int) -> None:
        self.weight_version = version

    async def check_weights(self, action: str, skip: tuple[str, ...]) -> dict[str, str]:
        if action == "compare":
            raise EngineError("there is no snapshot to compare with")
        return {"a": "0"} if action == "checksum" else {}

    async def _nothing(self, tags: tuple[str, ...] = ()) -> None: ...

    abort = pause = resume = release_memory = resume_memory = probe = _nothing


def _more_routes(bridge: Bridge) -> list[BaseRoute]:
    """Those that a served embedded engine has beside."""
    return [*worker_control.routes(Obeying()), *SessionServer(bridge).routes()]


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    """One server before an engine of its own loop."""
    engine = Scoring("ab<tool_call>{}$" * 4)
    limits = (CONTEXT, VOCAB)
    bridge = Bridge(lambda: engine, Letters, model="some/model", limits=lambda: limits)
    made = RouterServer(
        bridge, limits=Limits(body_bytes=1_000_000, request_s=5.0), routes=_more_routes(bridge)
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        made.serve_on(loop)
        yield made
        made.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _told(server: RouterServer) -> dict[str, Any]:
    return dict(requests.get(f"{server.url}/openapi.json", timeout=_TIMEOUT_S).json())


def _body(told: dict[str, Any], path: str) -> dict[str, Any]:
    content = told["paths"][path]["post"]["requestBody"]["content"]
    return dict(content["application/json"]["schema"])


def test_every_route_is_described(server: RouterServer) -> None:
    told = _told(server)
    steered = {one.path for one in worker_control.routes(Obeying()) if isinstance(one, Route)}
    for route in server.app.routes:
        assert isinstance(route, Route)
        summary = (description_of(route.endpoint) or ("",))[0]
        if summary.startswith(NOT_HERE) and route.path in steered:
            continue
        for method in (route.methods or set()) - {"HEAD"}:
            assert told["paths"][route.path_format][method.lower()]["summary"]


def test_bodies_have_the_fields_kinds_and_bounds_that_are_checked(server: RouterServer) -> None:
    told = _told(server)
    generate, chat = _body(told, "/generate"), _body(told, "/v1/chat/completions")
    (params, several, _) = generate["properties"]["sampling_params"]["anyOf"]
    assert several["items"] == params
    assert params["properties"]["max_new_tokens"] == {
        "type": ["integer", "null"],
        "minimum": 0,
        "default": 128,
    }
    assert params["properties"]["min_p"]["maximum"] == 1.0
    assert params["additionalProperties"] is generate["additionalProperties"] is False
    assert chat["required"] == ["messages"]
    assert "no penalties" in chat["properties"]["frequency_penalty"]["description"]
    assert _body(told, "/inference/v1/generate")["required"] == ["token_ids"]


def test_sessions_and_the_steering_of_an_engine_are_described(server: RouterServer) -> None:
    told = _told(server)
    here = "/sessions/{session_id}"
    chat, opened = _body(told, f"{here}/v1/chat/completions"), _body(told, "/sessions")
    assert chat["required"] == ["messages"] and "additionalProperties" not in chat
    assert chat["properties"]["temperature"]["minimum"] == 0.0
    assert opened["properties"]["max_context_len"]["minimum"] == 1
    assert "min_p" in opened["properties"]["sampling_params"]["properties"]
    assert set(_body(told, f"{here}/samples")["properties"]) == {"metadata", "max_seq_len"}
    update = _body(told, "/update_weights_from_disk")
    assert update["required"] == ["model_path"] and not update["additionalProperties"]
    assert _body(told, "/update_weight_version")["required"] == ["new_version"]
    assert _body(told, "/pause_generation")["properties"]["mode"] == {
        "enum": ["abort", "retract", "in_place", None]
    }


def test_tools_are_described_as_they_are_checked(server: RouterServer) -> None:
    told = _told(server)
    for path in ("/v1/chat/completions", "/sessions/{session_id}/v1/chat/completions"):
        valid = validator_for(_body(told, path)).is_valid
        body = {"messages": [{"role": "user", "content": "a"}]}
        function = {"name": "f", "parameters": {"properties": {}}}
        assert valid({**body, "tools": [{"type": "function", "function": function}, function]})
        for tools in ([3], [{}], [{"function": 3}], [{"name": "f", "parameters": 3}], "f"):
            assert not valid({**body, "tools": tools})


def test_the_root_says_where_everything_is(server: RouterServer) -> None:
    told = requests.get(server.url, timeout=_TIMEOUT_S).json()
    assert (told["name"], told["model"]) == ("dovetail", "some/model")
    paths = _told(server)["paths"]
    for path in (told["openapi"], *told["paths"].values()):
        assert path in paths


def test_a_request_in_the_described_form_is_answered(server: RouterServer) -> None:
    told = _told(server)
    for path, body in (
        ("/generate", {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"logprobs": 1}}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [104, 105]}),
    ):
        assert validator_for(_body(told, path)).is_valid(body)
        answer = requests.post(server.url + path, json=body, timeout=_TIMEOUT_S)
        assert answer.status_code == 200, answer.text


def _operations() -> dict[tuple[str, str], str]:
    """Path and method -> what it does."""
    bridge = Bridge(Scoring, Letters, model="some/model")
    app = make_app(bridge, access=Access(), limits=Limits(), routes=_more_routes(bridge))
    described = document(app.routes)
    return {
        (path, method): told["summary"]
        for path, methods in described["paths"].items()
        for method, told in methods.items()
    }


_ALL = _operations()
_REFUSED = [one for one, does in _ALL.items() if does.startswith("Not to be had")]
_REAL = {one: does for one, does in _ALL.items() if one not in _REFUSED}


def _fuzz(server: RouterServer, path: str, method: str, examples: int) -> int:
    """Ask with made-up requests; how many there were."""
    description = _told(server)
    is_error = validator_for({**description["components"]["schemas"]["Error"]}).is_valid
    operation = schemathesis.openapi.from_dict(description)[path][method.upper()]
    asked = 0

    def ask(case: Any) -> None:
        nonlocal asked
        asked += 1
        if "{session_id}" in path and asked % 4:
            case.path_parameters["session_id"] = _opened(server, sampling=asked % 2)
        answer = case.call(base_url=server.url, timeout=_TIMEOUT_S)
        told = f"{answer.status_code} {answer.text[:300]}"
        assert answer.status_code not in (500, 504), told
        if answer.status_code >= 400:
            assert is_error(answer.json()), told
            assert answer.json()["error"]["code"] == answer.status_code

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        if mode is GenerationMode.NEGATIVE and "requestBody" not in operation.definition.raw:
            continue
        settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    return asked


def _opened(server: RouterServer, sampling: int) -> str:
    body = {"session_id": uuid.uuid4().hex, **({"temperature": 0.5} if sampling else {})}
    answer = requests.post(f"{server.url}/sessions", json=body, timeout=_TIMEOUT_S)
    return str(answer.json()["session_id"])


@pytest.mark.parametrize(("path", "method"), _REAL)
def test_whatever_is_asked_is_answered_in_a_described_form(
    server: RouterServer, path: str, method: str
) -> None:
    first = next(one for one, does in _REAL.items() if does == _REAL[path, method])
    examples = _EXAMPLES if (path, method) == first else _OF_ALIASES
    assert _fuzz(server, path, method, examples) > 0
    assert requests.get(f"{server.url}/health", timeout=_TIMEOUT_S).status_code == 200


def test_what_is_not_to_be_had_is_refused_in_the_described_form(server: RouterServer) -> None:
    for path, method in _REFUSED:
        url = server.url + path.replace("{id}", "x")
        answer = requests.request(method, url, timeout=_TIMEOUT_S, json={"a": 1})
        assert answer.status_code == 501
        assert answer.json()["error"]["code"] == 501
