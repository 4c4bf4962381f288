"""`utils.http_utils`: JSON over HTTP with patience, one connection pool per event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

from dovetail.compat.modules.misc import get_current_node_ip, is_port_available
from dovetail.router.known import headers_for

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 1024
_RETRY_S = 1.0
_POLL_S = 1.0
_FINAL = (400, 401, 403, 413, 422, 501)
"""The request itself is wrong: it stays wrong however often it is made."""
_NO_SUCH_PATH = (404, 405)
"""Final where a server says so in JSON; proxies say it in HTML of a service that still starts."""
_WITHOUT_BODY = ("get", "delete", "head")

_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = WeakKeyDictionary()
_keepers: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = WeakKeyDictionary()


async def post(
    url: str,
    payload: Any,
    max_retries: int = 60,
    action: str = "post",
    headers: Mapping[str, str] | None = None,
) -> Any:
    """What `url` answers to `payload` as JSON: parsed if it is JSON, else its text.

    A broken connection and a status from 400 on are tried again, `max_retries` times in all, a
    second apart; not one that says that the request itself is wrong. `action` is the HTTP method.

    Raises:
        aiohttp.ClientError, OSError: what the last try ended with.
    """
    body = {} if action in _WITHOUT_BODY else {"json": payload or {}}
    for attempt in range(1, max(1, max_retries) + 1):
        try:
            return await _request(action, url, headers=headers, **body)
        # Whatever went wrong may be over in a second: an engine restarts, a router reloads.
        except Exception as error:
            log.info("%s failed (%d of %d): %s", url, attempt, max_retries, error)
            if attempt >= max_retries or _is_final(error):
                raise
            await asyncio.sleep(_RETRY_S)
    raise AssertionError("the last try returns or raises")


def _is_final(error: Exception) -> bool:
    if not isinstance(error, aiohttp.ClientResponseError):
        return False
    kind = error.headers.get("Content-Type", "") if error.headers else ""
    in_json = kind.startswith("application/json")
    return error.status in _FINAL or (error.status in _NO_SUCH_PATH and in_json)


async def get(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """What `url` answers, parsed; one try.

    Raises:
        aiohttp.ClientError: it can't be reached, or answered a status from 400 on.
    """
    return await _request("get", url, headers=headers)


async def wait_http_ok(
    url: str, *, json_payload: Any = None, timeout: float = 180.0, request_timeout: float = 60.0
) -> None:
    """Wait until `url` answers 200, to a POST if there is a payload and else to a GET.

    Raises:
        TimeoutError: it did not within `timeout` seconds.
    """
    method, body = ("get", {}) if json_payload is None else ("post", {"json": json_payload})
    body["timeout"] = aiohttp.ClientTimeout(total=request_timeout)
    end = time.monotonic() + timeout
    while (state := await _state(method, url, body)) != "status 200":
        if time.monotonic() >= end:
            raise TimeoutError(f"{url} is not ready after {timeout:g} s: {state}")
        await asyncio.sleep(min(_POLL_S, timeout))


async def _state(method: str, url: str, body: dict[str, Any]) -> str:
    try:
        async with _session().request(method, url, **body) as answer:
            return f"status {answer.status}"
    except (aiohttp.ClientError, OSError) as error:
        return repr(error)


def init_http_client(args: Any = None, *, concurrency: int | None = None) -> None:
    """Nothing to do: connections are opened when they are used, whatever the run has of engines."""


def get_rollout_num_engines(args: Any) -> int:
    """Engines that sample: `args.rollout_num_engines`, else GPUs over GPUs per engine."""
    known = getattr(args, "rollout_num_engines", None)
    if known is not None:
        return int(known)
    num_gpus = getattr(args, "rollout_num_gpus", None) or 0
    per_engine = getattr(args, "rollout_num_gpus_per_engine", None) or 1
    return max(1, num_gpus // per_engine) if num_gpus > 0 else 0


def find_available_port(base_port: int) -> int:
    """A free port somewhat above `base_port`.

    Raises:
        OSError: none is free.
    """
    start = base_port + random.randint(100, 1000)
    for port in (*range(start, 65536), *range(1024, start)):
        if is_port_available(port):
            return port
    raise OSError("no port is free")


def get_host_info() -> tuple[str, str]:
    """Name and address of this machine."""
    return socket.gethostname(), get_current_node_ip()


async def _request(
    method: str, url: str, headers: Mapping[str, str] | None = None, **kwargs: Any
) -> Any:
    headers = {**headers_for(url), **(headers or {})}
    async with _session().request(method, url, headers=headers, **kwargs) as answer:
        text = await answer.text()
        if answer.status >= 400:
            raise aiohttp.ClientResponseError(
                answer.request_info,
                answer.history,
                status=answer.status,
                message=text[:500] or answer.reason or "",
                headers=answer.headers,
            )
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _session() -> aiohttp.ClientSession:
    loop = asyncio.get_running_loop()
    session = _sessions.get(loop)
    if session is None or session.closed:
        session = _sessions[loop] = aiohttp.ClientSession(
            # A sampled response may take as long as it takes.
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS),
        )
        _keepers[loop] = loop.create_task(_close_at_the_end(session))
    return session


async def _close_at_the_end(session: aiohttp.ClientSession) -> None:
    """Ends by the cancellation that every loop's end brings to its tasks."""
    try:
        await asyncio.Event().wait()
    finally:
        await session.close()
