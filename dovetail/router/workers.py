"""The engines behind the server: who they are, and adding and removing them while it runs, in the
forms of sglang-router, vllm-router and the routers of slime and miles."""

from __future__ import annotations

import asyncio
import ipaddress
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.balancer.worker import WorkerState
from dovetail.router.bridge import Bridge
from dovetail.router.describe import described
from dovetail.router.fields import Fields, RequestError, wrong
from dovetail.router.reach import out_of_reach
from dovetail.router.respond import Json, failure, fields_of
from dovetail.types.errors import EngineError
from dovetail.types.ports import RemoteEngine

if TYPE_CHECKING:
    from dovetail.router.balancer.pool import Pool
    from dovetail.router.balancer.worker import Worker

DRAIN_S = 30.0
"""How long a removed engine may finish what it has; the rest is sent elsewhere."""
_REACTS_S = 10.0
_ALONE = "this server stands before one engine, which the run chose"
_FIXED = "this fleet takes no engines from outside"
_TAKES = "an engine's address, http://HOST:PORT"


@dataclass(frozen=True)
class Behind:
    """The engines of a fleet."""

    pool: Pool
    connect: Callable[[str, str | None], Awaitable[RemoteEngine]] | None = None
    """Gives the client of an engine at an address, which speaks the named dialect (None: find out);
    raises EngineError. None: no engines are added over HTTP."""


def worker_id(url: str) -> str:
    """The name of an engine in paths: always the same for one address."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, url))


def routes(bridge: Bridge, behind: Behind | None) -> list[BaseRoute]:
    """The routes about engines."""
    return [*_told(bridge, behind), *_changed(behind)]


def _told(bridge: Bridge, behind: Behind | None) -> list[BaseRoute]:
    async def workers(request: Request) -> Response:
        cards = _cards(request, bridge, behind)
        return Json({"workers": cards, "total": len(cards), "stats": _stats(cards)})

    async def one(request: Request) -> Response:
        name = request.path_params["id"]
        for card in _cards(request, bridge, behind):
            if name in (card["id"], card["url"]) or unquote(name) == card["url"]:
                return Json(card)
        raise _unknown(name)

    async def list_workers(request: Request) -> Response:
        return Json({"urls": [card["url"] for card in _cards(request, bridge, behind)]})

    return [
        Route("/workers", workers, methods=["GET"]),
        Route("/list_workers", list_workers, methods=["GET"]),
        Route("/workers/{id:path}", one, methods=["GET"]),
    ]


def _changed(behind: Behind | None) -> list[BaseRoute]:
    @described("Add an engine", _read, query=("url",))
    async def add(request: Request) -> Response:
        return Json(await _add(await _asked(request, behind), behind))

    @described("Take an engine out", _read, query=("url",))
    async def remove(request: Request) -> Response:
        url, _ = await _asked(request, behind)
        return Json(await _remove(url, behind))

    async def delete(request: Request) -> Response:
        return Json(await _remove(request.path_params["id"], behind))

    async def no_list(request: Request) -> Response:
        raise RequestError("DELETE /workers: name an engine, /workers/ID", status=405)

    async def refused(request: Request) -> Response:
        message = f"{request.url.path}: not to be had here: {_ALONE}"
        return failure(RequestError(message, status=501))

    handlers = (add, add, remove, delete, no_list)
    if behind is None:
        handlers = (refused,) * 5
    return [
        Route("/workers", handlers[0], methods=["POST"]),
        Route("/add_worker", handlers[1], methods=["POST"]),
        Route("/remove_worker", handlers[2], methods=["POST"]),
        Route("/workers/{id:path}", handlers[3], methods=["DELETE"]),
        Route("/workers", handlers[4], methods=["DELETE"]),
    ]


async def _asked(request: Request, behind: Behind | None) -> tuple[str, str | None]:
    """The address, from the query or the body, and the dialect."""
    query = request.query_params
    url = query.get("url") or query.get("worker_url")
    return read_worker(await fields_of(request), url)


def read_worker(fields: Fields, url: str | None = None) -> tuple[str, str | None]:
    """An engine as sglang-router's POST /workers describes it: its address and dialect."""
    named = [fields.text("url"), fields.text("worker_url")]
    url = url or next((one for one in named if one), None)
    if url is None:
        raise wrong("url", None, _TAKES)
    dialect = fields.choice("runtime", ("sglang", "vllm"))
    kind = fields.text("worker_type", "regular")
    if kind != "regular":
        raise fields.wrong("worker_type", kind, "'regular': engines prefill and decode alike")
    fields.refuse("engines are asked without one", api_key=None)
    fields.ignore("model_id", "priority", "cost", "labels", "bootstrap_port", "bootstrap_host")
    fields.ignore("tokenizer_path", "reasoning_parser", "tool_parser", "chat_template", "dp_aware")
    fields.ignore("health_check_timeout_secs", "health_check_interval_secs", "dp_rank", "dp_size")
    fields.ignore("health_success_threshold", "health_failure_threshold", "disable_health_check")
    fields.ignore("max_connection_attempts", "connection_mode")
    fields.finish()
    return url, dialect


def _read(fields: Fields, bridge: Bridge) -> tuple[str, str | None]:
    return read_worker(fields, fields.text("url") or "http://localhost")


async def _add(asked: tuple[str, str | None], behind: Behind | None) -> dict[str, Any]:
    assert behind is not None, "only then is this the handler"
    url, dialect = asked
    if behind.connect is None:
        raise RequestError(f"/workers: not to be had here: {_FIXED}", status=501)
    url = await allowed(url)
    pool = behind.pool
    if url in pool.workers:
        raise RequestError(f"url: {url} is there already", status=409, field="url", got=url)
    if why := await asyncio.to_thread(out_of_reach, url, pool.snapshot):
        raise RequestError(f"{url} was not added: {why}", status=409, field="url", got=url)
    try:
        engine = await behind.connect(url, dialect)
        try:
            await _admit(engine, pool)
        except EngineError:
            await engine.close()
            raise
    except EngineError as error:
        raise _not_added(url, error) from error
    return _done(url, "added", behind)


async def _admit(engine: RemoteEngine, pool: Pool) -> None:
    """Into the pool, with its weights; after an error it is not there."""
    if not await engine.healthy(_REACTS_S):
        raise EngineError(f"it does not react within {_REACTS_S:.0f} s")
    worker = pool.add(engine, ready=False)
    try:
        await pool.admit(engine.url)
    except EngineError:
        # Somebody may have taken it out meanwhile, and put another one there.
        if pool.workers.get(engine.url) is worker:
            await pool.remove(engine.url, drain=False)
        raise


async def _remove(name: str, behind: Behind | None) -> dict[str, Any]:
    assert behind is not None, "only then is this the handler"
    pool = behind.pool
    wanted = (name, unquote(name), name.rstrip("/"))
    url = next((one for one in pool.workers if one in wanted or worker_id(one) in wanted), None)
    if url is None:
        raise _unknown(name)
    usable = (WorkerState.READY, WorkerState.STARTING)
    if not any(one.state in usable for one in pool.workers.values() if one.url != url):
        raise RequestError(f"{url} is the last engine: add another one first", status=409)
    try:
        engine = await pool.remove(url, drain=True, timeout_s=DRAIN_S)
    except EngineError as error:
        raise _unknown(name) from error
    await engine.close()
    return _done(url, "removed", behind)


async def allowed(url: str) -> str:
    """An engine's address in the form that the pool knows.

    Raises:
        RequestError: it is none, or one that engines do not have: a cloud machine's facts about
            itself, for one, are found at link-local addresses.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise wrong("url", url, _TAKES) from error
    plain = parts.scheme in ("http", "https") and parts.path in ("", "/")
    if not plain or not host or parts.query or parts.fragment or "@" in parts.netloc:
        raise wrong("url", url, _TAKES)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port or 80)
    except (OSError, UnicodeError) as error:
        raise wrong("url", url, f"{_TAKES}: {host} is no name of a machine") from error
    for *_, address in found:
        if _is_special(str(address[0])):
            raise wrong("url", url, f"{_TAKES}; {address[0]} is no engine's")
    return f"{parts.scheme}://{parts.netloc}"


def _is_special(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    return bool(
        mapped.is_link_local
        or mapped.is_multicast
        or mapped.is_unspecified
        or str(mapped) in ("fd00:ec2::254", "255.255.255.255")
    )


def _done(url: str, what: str, behind: Behind) -> dict[str, Any]:
    name = worker_id(url)
    return {
        "status": "success",
        "success": True,
        "worker_id": name,
        "url": url,
        "location": f"/workers/{name}",
        "message": f"{what} {url}",
        "worker_urls": {one.url: one.in_flight for one in behind.pool.workers.values()},
    }


def _cards(request: Request, bridge: Bridge, behind: Behind | None) -> list[dict[str, Any]]:
    if behind is not None:
        return [_card(one, bridge) for one in behind.pool.workers.values()]
    card = {
        "id": "0",
        "url": f"{request.url.scheme}://{request.url.netloc}",
        "model_id": bridge.model,
        "worker_type": "regular",
        "is_healthy": not bridge.closing,
        "load": len(bridge.in_flight),
    }
    return [card]


def _card(worker: Worker, bridge: Bridge) -> dict[str, Any]:
    version = worker.weight_version
    return {
        "id": worker_id(worker.url),
        "url": worker.url,
        "model_id": bridge.model,
        "worker_type": "regular",
        "runtime_type": worker.dialect,
        "connection_mode": "http",
        "priority": 50,
        "cost": 1.0,
        "is_healthy": worker.ready,
        "state": worker.state.value,
        "reason": worker.reason,
        "load": worker.in_flight,
        "failures": worker.failures,
        "weight_version": None if version is None else str(version),
    }


def _stats(cards: list[dict[str, Any]]) -> dict[str, int]:
    return {"prefill_count": 0, "decode_count": 0, "regular_count": len(cards)}


def _unknown(name: str) -> RequestError:
    return RequestError(
        f"no engine is known as {name!r}",
        status=404,
        field="id",
        got=name,
        expected="an id or the address of one, as GET /workers has them",
    )


def _not_added(url: str, error: EngineError) -> RequestError:
    return RequestError(f"{url} was not added: {error}", status=502, field="url", got=url)
