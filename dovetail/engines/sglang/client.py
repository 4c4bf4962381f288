"""The client of one SGLang server, or of one `dovetail serve`, which speaks the same.

    generate() --> /generate                    answers when the response has ended
    abort()    --> /abort_request               ... or at once, with its tokens so far
    pause()    --> /pause_generation            requests stay open
    load_snapshot() --> /update_weights_from_disk
    resume()   --> /continue_generation         and go on, under the new weights

SGLang itself notes which weight version sampled which token, so that an answer over an update has a
span for each.

What has run: all of it against `dovetail serve`, and against a server of the tests that checks
every request against SGLang's schema; nothing yet against SGLang itself, whose kernels need a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.engines.launch import ClientSettings
from dovetail.engines.sglang import wire
from dovetail.engines.sglang.weights import WeightGroups, meet
from dovetail.types.calls import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
)
from dovetail.types.errors import (
    EngineError,
    EngineGoneError,
    RequestRefusedError,
    RequestTooLongError,
)
from dovetail.types.weights import Snapshot

CONTROL_S = 120.0
"""For an answer of a control route; a decode step of a large batch may come before it."""
_LOAD_S = 1800.0
_CLOSE_S = 5.0
_SWEEP_S = 0.2
_TOO_LONG = ("context length", "is longer than", "do not fit the context", "the context allows")


def make_client(url: str, settings: ClientSettings) -> SglangEngine:
    """The client of the server at `http://host:port`."""
    return SglangEngine(url, settings)


class SglangEngine:
    """Implements `types.ports.RemoteEngine` and `ScoringEngine` on an SGLang server.

    Logprobs: SGLang reports `log_softmax(logits / temperature)` of the sampled token, before top_p,
    top_k and min_p; `log_softmax(logits)` where it samples greedily. A server with
    SGLANG_RETURN_ORIGINAL_LOGPROB in its environment tells those of temperature 1, which must not
    be trained on.

    Seeds: a server draws with them only with `--enable-deterministic-inference`; without, the same
    request gives other tokens each time. `dovetail serve` always does.

    Args:
        url: `http://host:port`.
        settings: what the run knows.
    """

    dialect = "sglang"

    def __init__(self, url: str, settings: ClientSettings) -> None:
        self.url = url.rstrip("/")
        self.token = settings.token
        self._settings = settings
        self._http = HttpClient(
            self.url, self.token, settings.request_timeout_s, name=f"SGLang at {self.url}"
        )
        self.groups = WeightGroups(self._http)
        self._nonce, self._numbers = uuid.uuid4().hex[:8], itertools.count()
        self._open: dict[str, str] = {}
        """Wire id of each request under way, with the caller's id."""
        self._ended = asyncio.Event()
        self._held = self._closed = False
        self._experts: wire.ExpertShape | None = None

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate until a stop, the length limit or an abort; an aborted request keeps its tokens.

        Raises:
            RequestTooLongError: prompt plus `max_new_tokens` exceed the context: SGLang itself
                would shorten the response without a word.
            EngineGoneError: the server is gone, or broke down over the request.
            RequestRefusedError: the request is malformed, or has images.
            EngineError: the client is closed.
        """
        self._check(request)
        if request.sampling.max_new_tokens == 0:
            return GenerateResult(
                request.request_id,
                [],
                [],
                FinishReason.LENGTH,
                prompt_tokens=len(request.prompt_ids),
            )
        wire_id = self._wire_id(request.request_id)
        body = wire.generate_body(request, wire_id, self._settings.eos_token_ids)
        answer = await self._ask(wire_id, request.request_id, body)
        experts = self._expert_shape() if request.return_routed_experts else None
        return wire.generate_result(request, answer, self._settings.tokenizer, experts)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """The logprobs of a sequence's tokens.

        Raises:
            RequestRefusedError: the request is malformed, or of a temperature other than 1: SGLang
                tells prompt logprobs of the logits as they are.
        """
        self._check_score(request)
        wire_id = self._wire_id(request.request_id)
        answer = await self._ask(wire_id, request.request_id, wire.score_body(request, wire_id))
        return wire.score_result(request, answer)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests of this client (None: all); their `generate` returns with ABORT.

        Returns when they have; while everything is paused, at once: SGLang ends them when it goes
        on.
        """
        wanted = None if request_ids is None else set(request_ids)
        targets = [
            wire_id for wire_id, own in self._open.items() if wanted is None or own in wanted
        ]
        while pending := [wire_id for wire_id in targets if wire_id in self._open]:
            # One that is still on its way is not known to the server yet: ask again until it is.
            try:
                for wire_id in pending:
                    await self._http.tell("/abort_request", {"rid": wire_id}, timeout_s=CONTROL_S)
            except EngineGoneError:
                return  # Whoever waits for these requests learns the same from them.
            if self._held:
                return
            self._ended.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _SWEEP_S)

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it answers within that time, with a token where it may make one. Never raises."""
        path = "/model_info" if self._held else "/health_generate"
        try:
            await self._http.tell(path, method="GET", timeout_s=timeout_s)
        except EngineError:
            return False
        return True

    async def weight_version(self) -> int | None:
        """The version that it says its weights have; None: it was given none yet.

        Raises:
            EngineGoneError: it is no number: the weights are not ours.
        """
        info = await self._http.get("/model_info", timeout_s=CONTROL_S)
        try:
            return wire.version_number(str(info["weight_version"]))
        except (KeyError, TypeError, ValueError) as error:
            raise wire.MalformedAnswerError(f"SGLang at {self.url}: {error}") from error

    async def pause(self) -> None:
        """Hold every request where it is; no token is made until `resume`."""
        # Keys and values of requests under way are made again, under the weights of then.
        await self._http.post("/pause_generation", {"mode": "retract"}, timeout_s=CONTROL_S)
        self._held = True

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._http.post("/continue_generation", {}, timeout_s=CONTROL_S)
        self._held = False

    async def load_snapshot(self, snapshot: Snapshot) -> None:
        """Take these weights, forget keys and values of older ones, and say their version from then
        on. Requests under way are held meanwhile.

        Raises:
            EngineError: they did not arrive whole. SGLang 0.5 then has a part of them, under the
                old version: it must be started anew. `dovetail serve` has the old ones.
            BrokenUpdateError: hand to hand, the trainer or another engine broke off.
        """
        was_held = self._held
        if not was_held:
            await self.pause()
        if snapshot.meeting is not None:
            await meet(self._http, snapshot.meeting, snapshot.version, _LOAD_S)
        else:
            await self._read(snapshot, snapshot.directory)
        if not was_held:
            await self.resume()

    async def _read(self, snapshot: Snapshot, directory: Path | None) -> None:
        assert directory is not None, "files lie somewhere"
        body = {
            "model_path": str(directory.absolute()),
            "load_format": "auto",
            "weight_version": str(snapshot.version),
            "flush_cache": True,
        }
        answer = await self._http.post("/update_weights_from_disk", body, timeout_s=_LOAD_S)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineError(f"SGLang at {self.url} did not take version {snapshot.version}")

    async def flush_cache(self) -> None:
        """Forget keys and values that no request under way needs.

        Raises:
            EngineError: requests are under way.
        """
        await self._http.tell("/flush_cache", timeout_s=CONTROL_S)

    async def weight_digests(self) -> dict[str, str]:
        """SHA-256 of the bytes of each tensor that it holds, by its Hugging Face name; SGLang's own
        names are others."""
        found = await self.check_weights("checksum")
        return dict(found["ranks"][0]["checksums"])

    async def check_weights(self, action: str = "checksum") -> dict[str, Any]:
        """`checksum`, `snapshot`, `reset_tensors`, or `compare` with the snapshot.

        Raises:
            EngineError: they differ.
        """
        found = await self._http.post("/weights_checker", {"action": action}, timeout_s=_LOAD_S)
        return dict(found)

    async def sleep(self) -> None:
        """Give its memory (weights, keys and values) back until `wake`; what runs is aborted.

        SGLang needs `--enable-memory-saver`, which `launch` adds where the run sleeps.
        """
        await self.abort()
        await self._http.tell("/release_memory_occupation", {}, timeout_s=CONTROL_S)
        self._held = True

    async def wake(self) -> None:
        """Take memory again; weights must be loaded before the next request."""
        await self._http.tell("/resume_memory_occupation", {}, timeout_s=CONTROL_S)
        self._held = False

    async def close(self) -> None:
        """End what this client has under way with ABORT, and its connections; the server stays."""
        if self._closed:
            return
        self._closed = True
        # A server that does not react keeps nobody: its requests break off with the connections.
        with contextlib.suppress(TimeoutError, EngineError):
            await asyncio.wait_for(self.abort(), _CLOSE_S)
        await self._http.close()

    def _wire_id(self, request_id: str) -> str:
        # SGLang refuses an id that it has already, and aborts all that begin with one.
        return f"{request_id}~{self._nonce}.{next(self._numbers)}~"

    async def _ask(self, wire_id: str, request_id: str, body: dict[str, Any]) -> Any:
        self._open[wire_id] = request_id
        try:
            answer = await self._http.post("/generate", body)
        except EngineRefusedError as error:
            raise _refusal(request_id, error) from error
        finally:
            del self._open[wire_id]
            self._ended.set()
        if wire.answered_id(answer) not in (wire_id, None):
            # A connection is out of step, and would stay so: every later answer were another's.
            await self._http.close()
            raise EngineGoneError(f"request {request_id!r}: {self.url} answered another request")
        return answer

    def _expert_shape(self) -> wire.ExpertShape | None:
        directory = self._settings.model_dir
        if self._experts is None and directory is not None:
            self._experts = wire.expert_shape(
                orjson.loads((directory / "config.json").read_bytes())
            )
        return self._experts

    def _check(self, request: GenerateRequest) -> None:
        ids, sampling = request.prompt_ids, request.sampling
        self._check_ids(request.request_id, ids)
        if request.media is not None:
            raise RequestRefusedError(
                f"request {request.request_id!r} has images, which the SGLang engine does not take "
                "here; use --rollout-engine embedded (TOML: engine.rollout_engine)"
            )
        if not 0 <= request.num_generated <= len(ids) or sampling.max_new_tokens < 0:
            raise RequestRefusedError(
                f"request {request.request_id!r}: num_generated={request.num_generated} of "
                f"{len(ids)} ids and max_new_tokens={sampling.max_new_tokens} can't be"
            )
        full, limit = len(ids) + sampling.max_new_tokens, self._settings.max_context_len
        if full > limit:
            raise RequestTooLongError(
                f"request {request.request_id!r}: {len(ids)} prompt tokens + max_new_tokens="
                f"{sampling.max_new_tokens} = {full} tokens; the context allows {limit} "
                "(--rollout-max-context-len, rollout.rollout_max_context_len)"
            )

    def _check_score(self, request: ScoreRequest) -> None:
        ids = request.token_ids
        self._check_ids(request.request_id, ids)
        if not 1 <= request.start <= len(ids) or request.top < 0:
            raise RequestRefusedError(
                f"request {request.request_id!r}: start={request.start} of {len(ids)} ids and "
                f"top={request.top} can't be"
            )
        if request.temperature != 1.0:
            raise RequestRefusedError(
                f"request {request.request_id!r}: SGLang scores at temperature 1 only, not "
                f"{request.temperature:g}; score with --rollout-engine embedded (TOML: "
                "engine.rollout_engine)"
            )

    def _check_ids(self, request_id: str, ids: Sequence[int]) -> None:
        if self._closed:
            raise EngineError(f"request {request_id!r}: the engine is closed")
        vocab_size = self._settings.vocab_size
        if not ids or min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size):
            raise RequestRefusedError(
                f"request {request_id!r}: token ids must be one or more in "
                f"[0, {vocab_size or '...'}), got {len(ids)}"
                + (f" from {min(ids)} to {max(ids)}" if ids else "")
            )


def _refusal(request_id: str, error: EngineRefusedError) -> EngineError:
    message = f"request {request_id!r}: {error}"
    if error.status >= 500:
        # A step failed under it; the request itself was let in.
        return EngineGoneError(message)
    if any(words in error.said for words in _TOO_LONG):
        return RequestTooLongError(message)
    return RequestRefusedError(message)
