"""Everything beside generation: health, what is served, who is busy, aborts; and why the rest is
not to be had."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from dovetail import __version__
from dovetail.router.bridge import Bridge
from dovetail.router.describe import NOT_HERE, described
from dovetail.router.fields import Fields, RequestError
from dovetail.router.respond import Json, failure, fields_of
from dovetail.router.workers import Behind

_BY_THE_RUN = "the run itself gives its engine new weights, pauses it and resumes it"
REFUSED = {
    _BY_THE_RUN: (
        "update_weights_from_tensor update_weights_from_distributed update_weights_from_disk "
        "init_weights_update_group destroy_weights_update_group update_weights pull_weights "
        "init_weight_transfer_engine start_weight_update finish_weight_update collective_rpc "
        "release_memory_occupation resume_memory_occupation sleep wake_up pause_generation "
        "continue_generation pause resume weights_checker post_process_weights "
        "get_weights_by_name update_weight_version begin_weight_update end_weight_update"
    ),
    "the engine has one set of weights, no adapters": (
        "load_lora_adapter load_lora_adapter_from_tensors load_lora_adapter_from_distributed "
        "unload_lora_adapter v1/load_lora_adapter v1/unload_lora_adapter"
    ),
    "the engine generates, it does not embed, classify or score": (
        "encode classify v1/embeddings v1/score v1/rerank v1/responses v1/chat/completions/render"
    ),
    "the engine is not profiled from outside": "start_profile stop_profile",
}
"""Reason -> paths that are answered with 501 and that reason."""


def routes(bridge: Bridge, behind: Behind | None = None) -> list[BaseRoute]:
    """Routes for information and aborts, and those that are refused."""
    return [
        *_health(bridge, behind),
        *_facts(bridge),
        *_load(bridge),
        *_aborts(bridge),
        *_refused(),
    ]


def _health(bridge: Bridge, behind: Behind | None) -> list[BaseRoute]:
    async def health(request: Request) -> Response:
        if bridge.closing:
            return failure(RequestError("the run is ending", status=503))
        if behind is None:
            return Response(status_code=200)
        states = Counter(worker.state.value for worker in behind.pool.workers.values())
        if not states["ready"]:
            message = f"no engine takes requests: {dict(states) or 'there is none'}"
            return failure(RequestError(message, status=503, retry_after_s=1.0))
        return Json({"status": "ok", "workers": dict(states)})

    async def flush(request: Request) -> Response:
        busy = len(bridge.in_flight)
        if busy:
            return PlainTextResponse(f"{busy} requests are under way.\n", status_code=400)
        # Keys and values are shared among requests under way only: nothing outlives them.
        return PlainTextResponse("Cache flushed.\n")

    paths = ("/health", "/health_generate", "/v1/health", "/ping", "/liveness", "/readiness")
    return [
        *(Route(path, health, methods=["GET", "POST"]) for path in paths),
        Route("/flush_cache", flush, methods=["GET", "POST"]),
        Route("/reset_prefix_cache", flush, methods=["POST"]),
    ]


def _facts(bridge: Bridge) -> list[BaseRoute]:
    async def models(request: Request) -> Response:
        return Json(models_of(bridge))

    async def model_info(request: Request) -> Response:
        return Json(_model_info(bridge))

    async def server_info(request: Request) -> Response:
        busy = {"num_running_reqs": len(bridge.in_flight)}
        return Json({**_model_info(bridge), "version": __version__, "internal_states": [busy]})

    async def weight_version(request: Request) -> Response:
        return Json({"weight_version": str(bridge.weight_version)})

    async def version(request: Request) -> Response:
        return Json({"version": __version__})

    @described("What this is, and where the rest is")
    async def root(request: Request) -> Response:
        return Json(_front(bridge))

    handlers = {
        "/": root,
        "/v1/models": models,
        "/get_model_info": model_info,
        "/model_info": model_info,
        "/server_info": server_info,
        "/get_server_info": server_info,
        "/get_weight_version": weight_version,
        "/weight_version": weight_version,
        "/version": version,
    }
    return [Route(path, handler, methods=["GET"]) for path, handler in handlers.items()]


def _load(bridge: Bridge) -> list[BaseRoute]:
    async def loads(request: Request) -> Response:
        running = len(bridge.in_flight)
        one = {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": 0}
        one |= {"num_reqs": running, "num_total_reqs": running}
        return Json(
            {
                "timestamp": time.time(),
                "version": __version__,
                "dp_rank_count": 1,
                "loads": [one],
                "aggregate": {
                    "total_running_reqs": running,
                    "total_waiting_reqs": 0,
                    "total_reqs": running,
                },
            }
        )

    async def load(request: Request) -> Response:
        inflight = bridge.in_flight
        return Json(
            {"server_load": len(inflight), "inflight": inflight, "num_inflight": len(inflight)}
        )

    return [
        Route("/v1/loads", loads, methods=["GET"]),
        Route("/load", load, methods=["GET"]),
        Route("/get_load", load, methods=["GET"]),
    ]


def _aborts(bridge: Bridge) -> list[BaseRoute]:
    @described("End requests by name, or all", _read_abort)
    async def abort(request: Request) -> Response:
        everything, rids = _read_abort(await fields_of(request), bridge)
        # vLLM's router aborts everything when nothing is named.
        if everything or not rids:
            aborted = await bridge.abort()
        else:
            aborted = sum([await bridge.abort(rid) for rid in rids])
        return Json({"success": True, "aborted": aborted})

    paths = ("/abort_request", "/abort_requests", "/abort")
    return [Route(path, abort, methods=["POST"]) for path in paths]


def _read_abort(fields: Fields, bridge: Bridge) -> tuple[bool, list[str]]:
    """Whether everything is meant, and which names."""
    everything = fields.flag("abort_all", False)
    rids = [name for key in ("rid", "request_id", "request_ids") for name in fields.texts(key)]
    fields.ignore("abort_reason", "abort_message")
    fields.finish()
    return everything, rids


def _refused() -> list[BaseRoute]:
    def refuse(reason: str) -> Any:
        @described(f"{NOT_HERE}: {reason}")
        async def refused(request: Request) -> Response:
            message = f"{request.url.path}: not to be had here: {reason}"
            return failure(RequestError(message, status=501))

        return refused

    methods = ["GET", "POST", "PUT", "DELETE"]
    return [
        *(
            Route(f"/{path}", refuse(reason), methods=methods)
            for reason, paths in REFUSED.items()
            for path in paths.split()
        ),
    ]


def models_of(bridge: Bridge) -> dict[str, Any]:
    """The list with the one model, in OpenAI's form."""
    card = {
        "id": bridge.model,
        "object": "model",
        "created": 0,
        "owned_by": "dovetail",
        "root": bridge.model,
        "max_model_len": bridge.max_context_len,
    }
    return {"object": "list", "data": [card]}


def _front(bridge: Bridge) -> dict[str, Any]:
    """For whoever types the address into something."""
    return {
        "name": "dovetail",
        "version": __version__,
        "model": bridge.model,
        "weight_version": str(bridge.weight_version),
        "max_model_len": bridge.max_context_len,
        "openapi": "/openapi.json",
        "docs": "docs/serve.md and docs/engines.md of Dovetail's source tell of every route",
        "paths": {
            "generate": "/generate",
            "completions": "/v1/completions",
            "chat": "/v1/chat/completions",
            "models": "/v1/models",
            "workers": "/workers",
            "health": "/health",
            "metrics": "/metrics",
        },
    }


def _model_info(bridge: Bridge) -> dict[str, Any]:
    return {
        "model_path": bridge.model,
        "tokenizer_path": bridge.model,
        "is_generation": True,
        "weight_version": str(bridge.weight_version),
        "max_model_len": bridge.max_context_len,
        "max_total_num_tokens": bridge.max_context_len,
    }
