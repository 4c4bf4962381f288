"""SGLang as its clients see it: the routes, shapes and ways of sglang 0.5.23 around an engine of
ours, since its own kernels need a GPU. Every request is checked against `tests/sglang_schema.py`;
what SGLang would refuse, or pass over, is refused here and kept in `violations`.

    async with SglangServer(engine, context_len=64) as server:
        client = make_client(server.url, ...)
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from aiohttp import web

from dovetail.engines.embedded.engine import EmbeddedEngine
from dovetail.types.calls import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    ScoreRequest,
)
from dovetail.types.errors import EngineError
from tests.sglang_schema import CONTROL, problems_of_control, problems_of_generate

ReadWeights = Callable[[Path], dict[str, Any]]


class SglangServer:
    """One server on a port of its own.

    Args:
        engine: makes the tokens.
        context_len: of the model.
        read_weights: gives the tensors of a directory; raises where they are not the model's.
        max_layers: layers that routed experts are told of, dense ones as zeros (None: as many as
            the engine tells of).
    """

    def __init__(
        self,
        engine: EmbeddedEngine,
        *,
        context_len: int,
        read_weights: ReadWeights | None = None,
        max_layers: int | None = None,
    ) -> None:
        self._engine, self._context_len = engine, context_len
        self._read_weights, self._layers = read_weights, max_layers
        self.violations: list[str] = []
        self.asked: list[tuple[str, Any]] = []
        self.version = "default"
        self.broken = False
        """An update failed halfway: SGLang reads the same files again, and has a part of them."""
        self.groups: set[str] = set()
        self.url = ""
        self._running: dict[str, asyncio.Task[GenerateResult]] = {}
        self._released = self._paused = False
        self._mode = ""
        self._gate = asyncio.Event()
        self._gate.set()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**27)
        app.router.add_route("*", "/generate", self._generate)
        for path in CONTROL:
            app.router.add_route("*", path, self._control)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._runner is not None
        await self._engine.close()
        await self._runner.cleanup()

    def bodies(self, path: str) -> list[Any]:
        """What was asked of one route."""
        return [body for asked, body in self.asked if asked == path]

    async def _body(self, request: web.Request) -> Any:
        raw = await request.read()
        body = json.loads(raw) if raw else None
        self.asked.append((request.path, body))
        return body

    def _refused(self, problems: list[str]) -> web.Response:
        self.violations += problems
        return _error("; ".join(problems))

    async def _generate(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        problems = problems_of_generate(body)
        if problems:
            return self._refused(problems)
        rid, ids = body.get("rid") or f"own-{len(self.asked)}", body["input_ids"]
        most = (body.get("sampling_params") or {}).get("max_new_tokens", 128)
        if len(ids) >= self._context_len:
            return _error(
                f"The input ({len(ids)} tokens) is longer than the model's context length "
                f"({self._context_len} tokens)."
            )
        if rid in self._running:
            return _error(f"Duplicate request ID detected: {rid}")
        # SGLang shortens what would not fit, without a word.
        most = min(most, self._context_len - len(ids))
        await self._gate.wait()
        if self._released:
            return web.Response(status=500, text="Internal Server Error")
        if most == 0:
            return web.json_response(await self._scored(rid, body))
        task = asyncio.ensure_future(self._engine.generate(_request(rid, body, most)))
        self._running[rid] = task
        try:
            result = await task
        except EngineError as error:
            return _error(str(error))
        finally:
            task.cancel()
            self._running.pop(rid, None)
        return web.json_response(self._answer(rid, body, result))

    def _answer(self, rid: str, body: dict[str, Any], result: GenerateResult) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": _finish(result),
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": self.version,
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(result.token_ids),
            "cached_tokens": result.cached_tokens,
            "e2e_latency": 0.01,
        }
        if result.version_spans:
            spans = [(self._word(s.weight_version), s.start, s.end) for s in result.version_spans]
            meta["weight_versions"] = [
                {"version": version, "start": start, "end": end} for version, start, end in spans
            ]
            meta["weight_version"] = spans[-1][0]
        if body.get("return_logprob"):
            pairs = zip(result.logprobs, result.token_ids, strict=True)
            meta["output_token_logprobs"] = [[value, token, None] for value, token in pairs]
        if body.get("return_routed_experts") and result.routed_experts is not None:
            meta["routed_experts"] = self._packed(np.asarray(result.routed_experts, np.int32))
        return {"text": result.text, "output_ids": result.token_ids, "meta_info": meta}

    def _packed(self, experts: Any) -> str:
        rows, layers, top_k = experts.shape
        every = np.zeros((rows, self._layers or layers, top_k), np.int32)
        every[:, -layers:] = experts
        return base64.b64encode(every.tobytes()).decode()

    async def _scored(self, rid: str, body: dict[str, Any]) -> dict[str, Any]:
        ids, top = body["input_ids"], body.get("top_logprobs_num") or 0
        start = body.get("logprob_start_len", -1)
        start = len(ids) - 1 if start is None or start < 0 else start
        found = await self._engine.score(ScoreRequest(rid, tuple(ids), start + 1, 1.0, top))
        values = [None, *found.logprobs]
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "weight_version": self.version,
            "completion_tokens": 0,
            "cached_tokens": 0,
        }
        if body.get("return_logprob"):
            pairs = zip(values, ids[start:], strict=True)
            meta["input_token_logprobs"] = [[value, token, None] for value, token in pairs]
            meta["output_token_logprobs"] = []
        if top:
            places = [[[v, token, None] for token, v in place] for place in found.top]
            meta["input_top_logprobs"] = [None, *places]
        return {"text": "", "output_ids": [], "meta_info": meta}

    def _word(self, version: int) -> str:
        return "default" if version == 0 else str(version)

    async def _control(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        problems = problems_of_control(request.path, request.method, body)
        if problems:
            return self._refused(problems)
        handler = getattr(self, f"_do_{request.path.strip('/')}")
        response: web.Response = await handler(body or {})
        return response

    async def _do_health(self, body: dict[str, Any]) -> web.Response:
        return web.Response()

    async def _do_health_generate(self, body: dict[str, Any]) -> web.Response:
        # SGLang waits for a token that a paused engine never makes.
        return web.Response(status=503 if self._paused or self._released else 200)

    async def _do_model_info(self, body: dict[str, Any]) -> web.Response:
        return web.json_response({"weight_version": self.version, "is_generation": True})

    async def _do_flush_cache(self, body: dict[str, Any]) -> web.Response:
        if self._running and self._mode != "retract":
            return web.Response(status=400, text="Flush cache failed.\n")
        return web.Response(text="Cache flushed.\n")

    async def _do_abort_request(self, body: dict[str, Any]) -> web.Response:
        rid = body.get("rid") or ""
        # Of a name that it does not know it says nothing; one that it knows stands for all that
        # begin with it.
        if body.get("abort_all") or rid in self._running:
            names = [n for n in self._running if body.get("abort_all") or n.startswith(rid)]
            await self._engine.abort(names)
        return web.Response()

    async def _do_pause_generation(self, body: dict[str, Any]) -> web.Response:
        self._mode = body.get("mode", "abort")
        self._gate.clear()
        self._paused = True
        await self._engine.pause()
        if self._mode == "abort":
            await self._engine.abort()
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _do_continue_generation(self, body: dict[str, Any]) -> web.Response:
        self._paused = False
        self._gate.set()
        await self._engine.resume()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _do_update_weights_from_disk(self, body: dict[str, Any]) -> web.Response:
        assert self._read_weights is not None
        if not self._paused and self._running:
            # Without a pause it waits for every request to end.
            await asyncio.wait(self._running.values())
        try:
            tensors = self._read_weights(Path(body["model_path"]))
        except Exception as error:
            self.broken = True
            message = f"Failed to update weights: {error}.\nRolling back to original weights."
            said = {"success": False, "message": message, "num_paused_requests": 0}
            return web.json_response(said, status=400)
        version = body.get("weight_version")
        number = int(version) if version is not None else self._engine.weight_version
        await self._engine.receive_weights(number, tensors.items())
        self.version = version if version is not None else self.version
        message = f"Succeeded to update model weights. Weight version updated to {version}."
        said = {"success": True, "message": message, "num_paused_requests": len(self._running)}
        return web.json_response(said)

    async def _do_update_weight_version(self, body: dict[str, Any]) -> web.Response:
        self.version = body["new_version"]
        await self._engine.receive_weights(int(self.version), None)
        return _did(True, f"Weight version updated to {self.version}")

    async def _do_init_weights_update_group(self, body: dict[str, Any]) -> web.Response:
        self.groups.add(body.get("group_name", "weight_update_group"))
        return _did(True, "Succeeded to initialize custom process group.")

    async def _do_destroy_weights_update_group(self, body: dict[str, Any]) -> web.Response:
        name = body.get("group_name", "weight_update_group")
        known = name in self.groups
        self.groups.discard(name)
        return _did(known, "Succeeded" if known else f"The group {name} does not exist.")

    async def _do_update_weights_from_distributed(self, body: dict[str, Any]) -> web.Response:
        known = body.get("group_name", "weight_update_group") in self.groups
        even = len(body["names"]) == len(body["dtypes"]) == len(body["shapes"])
        if known and even and body.get("weight_version") is not None:
            self.version = body["weight_version"]
        return _did(known and even, "Succeeded" if known else "Group not initialized")

    async def _do_release_memory_occupation(self, body: dict[str, Any]) -> web.Response:
        if self._running:
            return web.Response(status=500, text="Internal Server Error")
        self._released = True
        return web.json_response(None)

    async def _do_resume_memory_occupation(self, body: dict[str, Any]) -> web.Response:
        self._released = False
        return web.json_response(None)

    async def _do_weights_checker(self, body: dict[str, Any]) -> web.Response:
        return _did(True, "Success")


def _request(rid: str, body: dict[str, Any], most: int) -> GenerateRequest:
    wanted = {key: value for key, value in body["sampling_params"].items() if value is not None}
    generated = wanted.get("custom_params", {}).get("num_generated", 0)
    sampling = SamplingParams(
        max_new_tokens=most,
        min_new_tokens=wanted.get("min_new_tokens", 0) + generated,
        temperature=wanted.get("temperature", 1.0),
        top_p=wanted.get("top_p", 1.0),
        top_k=wanted.get("top_k", -1),
        min_p=wanted.get("min_p", 0.0),
        stop=tuple(wanted.get("stop", ())),
        stop_token_ids=tuple(wanted.get("stop_token_ids", ())),
        ignore_eos=wanted.get("ignore_eos", False),
        skip_special_tokens=wanted.get("skip_special_tokens", True),
        seed=wanted.get("sampling_seed"),
    )
    # SGLang draws by seed and place in the sequence, so that a response goes on as it would have.
    return GenerateRequest(
        rid,
        tuple(body["input_ids"]),
        sampling,
        num_generated=generated,
        return_routed_experts=body.get("return_routed_experts", False),
    )


def _finish(result: GenerateResult) -> dict[str, Any]:
    if result.finish_reason is FinishReason.ABORT:
        return {"type": "abort", "message": "Abort in waiting queue", "status_code": None}
    if result.finish_reason is FinishReason.LENGTH:
        return {"type": "length", "length": len(result.token_ids)}
    return {"type": "stop", "matched": result.token_ids[-1]}


def _did(success: bool, message: str) -> web.Response:
    said = {"success": success, "message": message}
    return web.json_response(said, status=200 if success else 400)


def _error(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)
