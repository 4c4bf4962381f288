"""The client of one vLLM server: requests over `/inference/v1/generate`, control over the routes
that a server has with VLLM_SERVER_DEV_MODE=1.

    generate() --> /inference/v1/generate       answers when the response has ended
    abort()    --> /abort_requests              ... or at once, with its tokens so far
    pause()    --> /pause?mode=keep             requests stay open
    load_snapshot() --> weights.py
    resume()   --> /resume                      and go on, under the new weights

vLLM itself notes which weight version sampled which token, so that an answer over an update has a
span for each.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.engines.launch import ClientSettings
from dovetail.engines.vllm import wire
from dovetail.engines.vllm.launch import logprobs_mode
from dovetail.engines.vllm.weights import WeightTransfer
from dovetail.types.calls import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    ScoreRequest,
    ScoreResult,
)
from dovetail.types.errors import EngineError, EngineGoneError, RequestTooLongError
from dovetail.types.weights import Snapshot

log = logging.getLogger(__name__)

_CONTROL_S = 120.0
"""For an answer of a control route; a decode step of a large batch may come before it."""
_SWEEP_S = 0.05
_MOST_FIGURES = 1 << 22
"""Logprobs in one answer when a score needs those of the whole vocabulary."""
_TOO_LONG = ("maximum context length", "max_model_len", "longer than the maximum")


def make_client(url: str, settings: ClientSettings) -> VllmEngine:
    """The client of the server at `http://host:port`."""
    return VllmEngine(url, settings)


class VllmEngine:
    """Implements `types.ports.RemoteEngine` and `ScoringEngine` on a vLLM server.

    Logprobs: a server that `launch` started reports `log_softmax(logits / temperature)` of the
    sampled token for every request at temperature 1 (or 0) of a run whose rollouts have that
    temperature, whatever top_p, top_k and min_p are. At any other temperature vLLM offers only
    figures taken after top_p, top_k and min_p (`--logprobs-mode processed_logprobs`): they agree
    where these keep everything, and are larger by the log of the mass that was cut away where they
    do not; before `min_new_tokens` the mass of the stop tokens is missing in the same way. A
    request whose figures differ is warned of once.

    Seeds: vLLM draws from one generator per request. The same request with the same seed gives the
    same tokens; the draws of a continued response depend on (seed, where it goes on), so that
    splitting a response in other places gives other tokens.

    Args:
        url: `http://host:port`.
        settings: what the run knows.
    """

    dialect = "vllm"

    def __init__(self, url: str, settings: ClientSettings) -> None:
        self.url = url.rstrip("/")
        self.token = settings.token
        self._settings = settings
        self._http = HttpClient(
            self.url, self.token, settings.request_timeout_s, name=f"vLLM at {self.url}"
        )
        self.transfer = WeightTransfer(self._http)
        self._open: dict[str, str] = {}
        """Wire id of each request under way, with the caller's id."""
        self._ended = asyncio.Event()
        self._paused = False
        self._closed = False
        self._mode: str | None = None
        self._warned: set[str] = set()

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate until a stop, the length limit or an abort; an aborted request keeps its tokens.

        Raises:
            RequestTooLongError: prompt plus `max_new_tokens` exceed the context.
            EngineGoneError: the server is gone, or broke down over the request.
            EngineError: the request is malformed or has images, or the client is closed.
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
        await self._warn_of_other_figures(request.sampling)
        wire_id = uuid.uuid4().hex
        body = wire.generate_body(request, wire_id, self._settings.eos_token_ids)
        answer = await self._ask(wire_id, request.request_id, body)
        return wire.generate_result(request, answer, self._settings.tokenizer)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """The logprobs of a sequence's tokens, after whatever waits before it.

        vLLM computes prompt logprobs at temperature 1 only. For another one the logprobs of the
        whole vocabulary are asked for, which is slow, and limited to small vocabularies.

        Raises:
            EngineError: the request is malformed, or needs too many figures.
        """
        self._check_score(request)
        if request.start == len(request.token_ids):
            return ScoreResult([], [], await self.weight_version() or 0)
        wire_id = uuid.uuid4().hex
        answer = await self._ask(wire_id, request.request_id, wire.score_body(request, wire_id))
        return wire.score_result(request, answer)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests of this client (None: all); their `generate` returns with ABORT."""
        wanted = None if request_ids is None else set(request_ids)
        targets = {
            wire_id: own for wire_id, own in self._open.items() if wanted is None or own in wanted
        }
        while pending := [wire_id for wire_id in targets if wire_id in self._open]:
            # One that is still on its way is not known to the server yet: ask again until it is.
            try:
                await self._http.post(
                    "/abort_requests",
                    {"request_ids": [f"generate-tokens-{wire_id}" for wire_id in pending]},
                    timeout_s=_CONTROL_S,
                )
            except EngineGoneError:
                return  # Whoever waits for these requests learns the same from them.
            self._ended.clear()
            try:
                await asyncio.wait_for(self._ended.wait(), _SWEEP_S)
            except TimeoutError:
                continue

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it answers within that time. Never raises."""
        try:
            await self._http.tell("/health", method="GET", timeout_s=timeout_s)
        except EngineError:
            return False
        return True

    async def weight_version(self) -> int | None:
        """The version that it says its weights have; None: it was given none yet.

        Raises:
            EngineGoneError: it is no number: an update broke off, or the weights are not ours.
        """
        said = await self.transfer.version()
        return None if said is None else wire.version_number(said)

    async def pause(self) -> None:
        """Hold every request where it is; no token is made until `resume`."""
        await self._http.post("/pause?mode=keep", timeout_s=_CONTROL_S)
        self._paused = True

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._http.post("/resume", timeout_s=_CONTROL_S)
        self._paused = False

    async def load_snapshot(self, snapshot: Snapshot) -> None:
        """Take these weights, forget keys and values of older ones, and say their version from then
        on. Requests under way are held meanwhile, and their keys and values computed again.

        Raises:
            EngineError: they did not arrive whole. The old ones are still in place where the
                snapshot itself was at fault; else the server says no version that is a number.
        """
        was_paused = self._paused
        if not was_paused:
            await self.pause()
        try:
            await self.transfer.load(snapshot)
        finally:
            if not was_paused:
                await self.resume()

    async def sleep(self) -> None:
        """Give its memory (weights, keys and values) back until `wake`; what runs is aborted.

        On a GPU only, and there with `--enable-sleep-mode`, which `launch` adds where the run
        sleeps; vLLM on a CPU keeps its memory and holds requests meanwhile.
        """
        await self._http.post("/sleep?level=2&mode=abort", timeout_s=_CONTROL_S)

    async def wake(self) -> None:
        """Take memory again; weights must be loaded before the next request."""
        await self._http.post("/wake_up", timeout_s=_CONTROL_S)
        if self._paused:  # Waking lets requests run.
            await self.pause()

    async def close(self) -> None:
        """End what this client has under way with ABORT, and its connections; the server stays."""
        if not self._closed:
            self._closed = True
            await self.abort()
            await self._http.close()

    async def _ask(self, wire_id: str, request_id: str, body: dict[str, Any]) -> Any:
        self._open[wire_id] = request_id
        try:
            return await self._http.post("/inference/v1/generate", body)
        except EngineRefusedError as error:
            raise self._refusal(request_id, error) from error
        finally:
            del self._open[wire_id]
            self._ended.set()

    def _refusal(self, request_id: str, error: EngineRefusedError) -> EngineError:
        message = f"request {request_id!r}: {error}"
        if error.status >= 500:
            # vLLM ends after an error inside a step; the request itself was let in.
            return EngineGoneError(message)
        if error.status in (403, 404):
            return EngineError(
                f"{message}; a server that was started elsewhere needs --enable-scale-out, and "
                "VLLM_SERVER_DEV_MODE=1 in its environment"
            )
        if any(words in error.said for words in _TOO_LONG):
            return RequestTooLongError(message)
        return EngineError(message)

    def _check(self, request: GenerateRequest) -> None:
        ids, sampling = request.prompt_ids, request.sampling
        self._check_ids(request.request_id, ids)
        if request.media is not None:
            raise EngineError(
                f"request {request.request_id!r} has images, which the vLLM engine does not take "
                "here; use --rollout-engine embedded (TOML: engine.rollout_engine)"
            )
        if not 0 <= request.num_generated <= len(ids) or sampling.max_new_tokens < 0:
            raise EngineError(
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
        if not 1 <= request.start <= len(ids) or request.top < 0 or request.temperature <= 0:
            raise EngineError(
                f"request {request.request_id!r}: start={request.start} of {len(ids)} ids, "
                f"top={request.top} and temperature={request.temperature} can't be"
            )
        # vLLM generates one token behind them.
        if len(ids) >= self._settings.max_context_len:
            raise RequestTooLongError(
                f"request {request.request_id!r}: {len(ids)} tokens to score; vLLM takes one less "
                f"than its context of {self._settings.max_context_len}"
            )
        vocab_size = self._settings.vocab_size or 1 << 18
        if request.temperature != 1.0 and len(ids) * vocab_size > _MOST_FIGURES:
            raise EngineError(
                f"request {request.request_id!r}: vLLM scores at temperature 1 only, and "
                f"{len(ids)} tokens of {vocab_size} candidates are too many to rescale here; score "
                "at temperature 1, or with --rollout-engine embedded (TOML: engine.rollout_engine)"
            )

    def _check_ids(self, request_id: str, ids: Sequence[int]) -> None:
        if self._closed:
            raise EngineError(f"request {request_id!r}: the engine is closed")
        vocab_size = self._settings.vocab_size
        if not ids or min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size):
            raise EngineError(
                f"request {request_id!r}: token ids must be one or more in "
                f"[0, {vocab_size or '...'}), got {len(ids)}"
                + (f" from {min(ids)} to {max(ids)}" if ids else "")
            )

    async def _warn_of_other_figures(self, sampling: SamplingParams) -> None:
        """Say once where this server's logprobs are not those of the trainer's convention."""
        plain = sampling.temperature in (0.0, 1.0)
        whole = sampling.top_p == 1.0 and sampling.top_k <= 0 and sampling.min_p == 0.0
        if plain and (whole or self._mode == "raw_logprobs"):
            return
        if self._mode is None:
            self._mode = await self._asked_mode()
        if self._mode == "raw_logprobs":
            wrong = "" if plain else "they are those of temperature 1"
        elif self._mode == "processed_logprobs":
            wrong = "" if whole else "they are taken after top_p, top_k and min_p"
        else:
            wrong = f"its --logprobs-mode is {self._mode}"
        if wrong and wrong not in self._warned:
            self._warned.add(wrong)
            wanted = logprobs_mode(sampling.temperature)
            log.warning(
                "logprobs of vLLM at %s are not log_softmax(logits / temperature) for temperature "
                "%g, top_p %g, top_k %d, min_p %g: %s (--logprobs-mode %s comes closest)",
                *(self.url, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p),
                *(wrong, wanted),
            )

    async def _asked_mode(self) -> str:
        try:
            info = await self._http.get("/server_info?config_format=json", timeout_s=_CONTROL_S)
            return str(info["vllm_config"]["model_config"]["logprobs_mode"])
        except (EngineError, KeyError, TypeError):
            return "unknown"
