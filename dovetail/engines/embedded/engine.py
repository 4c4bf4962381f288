"""The embedded engine as the pipeline sees it: requests on an event loop, steps in one worker
thread.

    generate() --arrivals--> driver task --run()--> worker thread (admit, prefill, decode, sample)
        ^                        |                       |
        +------ future ----------+<-- finished ----------+

The driver exists only while there is work. Whenever a run of steps returns, the driver lets every
ready callback of the loop run before the next one, so that requests which follow from finished ones
enter in the same order every time: the same requests give the same tokens, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from dovetail.engines.embedded.core import EngineCore, EngineStats, Finished
from dovetail.engines.embedded.media import media_token_ids, position_offset
from dovetail.engines.embedded.scoring import Scoring, Waiting
from dovetail.engines.embedded.sequence import Sequence
from dovetail.types.calls import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
)
from dovetail.types.errors import EngineError, RequestRefusedError, RequestTooLongError
from dovetail.types.ports import Tokenizer

_YIELDS = 32
_SEED_MASK = 2**64 - 1


class EmbeddedEngine:
    """Implements `types.ports.Engine`, `EngineControl` and `ScoringEngine` on a model in this
    process.

    The model's parameters are the trainer's: nothing is copied, and values written in place are
    what the next request sees. Parameters must not be written while requests run; `pause` first.

    Args:
        max_running: most sequences decoded at once.
        kv_tokens: tokens that the KV cache holds, allocated here once.
        max_context_len: most tokens of prompt plus response.
        fused: "auto" takes the fused path where it agrees with the model's logits, "on" raises
            where it does not, "off" runs the model's modules.
        cuda_graphs: replay decode steps as CUDA graphs where the model is on a GPU and the path is
            fused.
        eos_token_ids: tokens that end a response unless `ignore_eos`.
        worker: the one thread that decode steps run in; default: one of the engine's own. Give the
            thread that trains: two threads with a team of OpenMP threads each slow each other.

    Raises:
        EngineError: the model can't be run by this engine; or `fused` is "on" and does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        *,
        max_running: int,
        kv_tokens: int,
        max_context_len: int,
        fused: Literal["auto", "on", "off"] = "auto",
        cuda_graphs: bool = True,
        eos_token_ids: tuple[int, ...] = (),
        worker: ThreadPoolExecutor | None = None,
    ) -> None:
        self._core = EngineCore(
            model,
            tokenizer,
            max_running=max_running,
            kv_tokens=kv_tokens,
            max_context_len=max_context_len,
            fused=fused,
            cuda_graphs=cuda_graphs,
        )
        self.fused: bool = self._core.runner.cascade
        self.fused_reason: str = self._core.reason
        self.weight_version = 0
        self._model = model
        self._tokenizer = tokenizer
        self._max_context_len = max_context_len
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self._eos_token_ids = tuple(eos_token_ids)
        self._never_ids = media_token_ids(model)
        self._worker = worker or ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._owns_worker = worker is None
        self._burst: Future[Any] | None = None
        self._scoring = Scoring(model)
        self._driver: asyncio.Task[None] | None = None
        self._arrived: list[Sequence] = []
        self._open: dict[int, Sequence] = {}
        self._arrivals = 0
        self._paused = False
        self._closed = False
        self._spoiled: EngineError | None = None

    @property
    def stats(self) -> EngineStats:
        """Counters since the engine was built."""
        return self._core.stats

    @property
    def num_open(self) -> int:
        """Requests under way, waiting ones too."""
        return len(self._open)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate until a stop, the length limit or an abort; an aborted request keeps its tokens.

        Raises:
            RequestTooLongError: prompt plus `max_new_tokens` exceed the context or the KV cache.
            RequestRefusedError: the request is malformed.
            EngineError: the engine is closed, or a step failed.
        """
        self._check(request)
        loop = asyncio.get_running_loop()
        seed = request.sampling.seed
        sequence = Sequence(
            request,
            (self._arrivals if seed is None else seed) & _SEED_MASK,
            self._eos_token_ids,
            self._arrivals,
            loop.create_future(),
        )
        sequence.position_offset = position_offset(self._model, request)
        sequence.never_ids = self._never_ids
        self._arrivals += 1
        if request.sampling.max_new_tokens == 0:
            return sequence.result(FinishReason.LENGTH, self._tokenizer)
        self._open[sequence.order] = sequence
        self._arrived.append(sequence)
        self._wake()
        try:
            result: GenerateResult = await sequence.future
            return result
        finally:
            if not sequence.future.done() or sequence.future.cancelled():
                sequence.abort_requested = True
                self._core.interrupted = True
            self._open.pop(sequence.order, None)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """The logprobs of tokens that are there already, between two steps of generation.

        They are those of the model's own forward, which the engine's steps were checked against
        when it was built; in float32 the two agree to rounding. An abort does not touch it.

        Raises:
            EngineError: the request is malformed, the engine is closed, or the forward failed.
        """
        self._check_usable(request.request_id)
        self._scoring.check(request, self._max_context_len)
        future: asyncio.Future[ScoreResult] = asyncio.get_running_loop().create_future()
        self._scoring.waiting.append(Waiting(request, future))
        self._wake()
        return await future

    async def abort(self, request_ids: Seq[str] | None = None) -> None:
        """End these requests (None: all, waiting ones too); their `generate` returns with ABORT."""
        wanted = None if request_ids is None else set(request_ids)
        targets = [
            s for s in self._open.values() if wanted is None or s.request.request_id in wanted
        ]
        for sequence in targets:
            sequence.abort_requested = True
        if self._driver is None:
            self._sweep()
        elif targets:
            self._core.interrupted = True
            await asyncio.wait([s.future for s in targets])

    async def pause(self) -> None:
        """Finish the current decode step, then hold all requests where they are."""
        self._paused = True
        self._core.interrupted = True
        if self._driver is not None:
            await asyncio.wait([self._driver])

    async def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        if self._spoiled is not None:
            self._fail(self._spoiled)
        if self._open or self._scoring.waiting:
            self._wake()

    async def sleep(self) -> None:
        """Give the memory of keys and values back until `wake`; requests wait where they are."""
        await self.pause()
        self._core.scheduler.reset()
        self._core.cache.release()

    def wake(self) -> None:
        """Take that memory again; `resume` goes on."""
        self._core.cache.clear()

    async def receive_weights(
        self, version: int, tensors: Iterable[tuple[str, torch.Tensor]] | None
    ) -> None:
        """Take new weights under their Hugging Face names, or (None) note that the shared ones
        changed.

        Keys and values of requests under way are computed again under the new weights.

        Raises:
            EngineError: a name is not one of the model's, or a shape differs.
        """
        was_paused = self._paused
        await self.pause()
        if tensors is not None:
            self._copy_weights(tensors)
            self._spoiled = None
        if tensors is not None or version != self.weight_version:
            self._core.scheduler.reset()
        self.weight_version = self._core.version = version
        if not was_paused:
            await self.resume()

    async def close(self) -> None:
        """Release everything. Requests in flight end with ABORT; later ones raise EngineError."""
        if self._closed:
            return
        await self.abort()
        await self.pause()
        self._closed = True
        self._scoring.fail(EngineError("the engine is closed"))
        if self._owns_worker:
            self._worker.shutdown(wait=True)
        self._core.cache.release()

    def spoil(self, reason: str) -> None:
        """Its weights are no version's: it answers nothing until it receives some. In a pause."""
        self._spoiled = EngineError(f"the engine's weights are of no use: {reason}")

    def _check(self, request: GenerateRequest) -> None:
        ids, sampling = request.prompt_ids, request.sampling
        self._check_usable(request.request_id)
        if not ids or min(ids) < 0 or max(ids) >= self._vocab_size:
            raise RequestRefusedError(
                f"request {request.request_id!r}: prompt_ids must be one or more ids in "
                f"[0, {self._vocab_size}), got {len(ids)}"
                + (f" from {min(ids)} to {max(ids)}" if ids else "")
            )
        if not 0 <= request.num_generated <= len(ids) or sampling.max_new_tokens < 0:
            raise RequestRefusedError(
                f"request {request.request_id!r}: num_generated={request.num_generated} of "
                f"{len(ids)} ids and max_new_tokens={sampling.max_new_tokens} can't be"
            )
        if request.return_routed_experts and self._core.recorder is None:
            raise RequestRefusedError(
                f"request {request.request_id!r}: there are no experts to record: "
                f"{self._core.routing_reason}. Leave --use-rollout-routing-replay (TOML: "
                "algorithm.use_rollout_routing_replay) out"
            )
        full = len(ids) + sampling.max_new_tokens
        limit = min(self._max_context_len, self._core.cache.tokens)
        if full > limit:
            raise RequestTooLongError(
                f"request {request.request_id!r}: {len(ids)} prompt tokens + max_new_tokens="
                f"{sampling.max_new_tokens} = {full} tokens; the context allows "
                f"{self._max_context_len} (--rollout-max-context-len, "
                "rollout.rollout_max_context_len) and the KV cache holds "
                f"{self._core.cache.tokens} (--engine-kv-tokens, engine.engine_kv_tokens)"
            )

    def _check_usable(self, request_id: str) -> None:
        if self._closed or self._spoiled is not None:
            raise EngineError(f"request {request_id!r}: {self._spoiled or 'the engine is closed'}")

    def _copy_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        with torch.no_grad():
            for name, tensor in tensors:
                if name == "lm_head.weight" and name not in own:
                    continue  # tied to the embedding, which comes under its own name
                if name not in own or own[name].shape != tensor.shape:
                    got = tuple(own[name].shape) if name in own else "no such name"
                    raise EngineError(
                        f"weights received: {name!r} has shape {tuple(tensor.shape)}, "
                        f"expected {got}"
                    )
                own[name].copy_(tensor)

    def _wake(self) -> None:
        self._core.interrupted = True
        if self._paused:
            return
        loop = asyncio.get_running_loop()
        stale = self._driver is not None and self._driver.get_loop() is not loop
        if self._driver is None or self._driver.done() or stale:
            self._driver = loop.create_task(self._drive())

    async def _drive(self) -> None:
        driver = asyncio.current_task()
        begun = False
        try:
            while True:
                for _ in range(_YIELDS):
                    await asyncio.sleep(0)
                self._core.interrupted = False
                self._take_arrivals()
                self._sweep()
                if self._paused or not (self._core.has_work or self._scoring.waiting):
                    return
                await self._score_waiting()
                if self._paused or not self._core.has_work:
                    continue
                if not begun:
                    self._core.runner.begin()
                    begun = True
                self._burst = self._worker.submit(self._core.run)
                finished: Finished = await asyncio.wrap_future(self._burst)
                for sequence, reason in finished:
                    self._deliver(sequence, reason)
        except asyncio.CancelledError:
            # The loop is being torn down; the step under way must not outlive its driver.
            self._core.interrupted = True
            if self._burst is not None and not self._burst.cancelled():
                wait([self._burst])
            raise
        except Exception as error:
            # Whoever waits learns of it; the engine itself starts afresh with the next request.
            self._fail(error)
        finally:
            if begun:
                self._core.runner.end()
            if self._driver is driver:
                self._driver = None

    async def _score_waiting(self) -> None:
        """Everything that waits to be scored: a forward is short beside a response."""
        for batch in self._scoring.take():
            requests = [one.request for one in batch]
            self._burst = self._worker.submit(self._scoring.run, requests, self.weight_version)
            try:
                results = await asyncio.wrap_future(self._burst)
            # As in `_drive`: whoever waits learns of it.
            except Exception as error:
                self._scoring.waiting.extend(batch)
                self._scoring.fail(_as_engine_error(error, "scoring"))
                continue
            for one, result in zip(batch, results, strict=True):
                if not one.abandoned:
                    one.future.set_result(result)

    def _take_arrivals(self) -> None:
        for sequence in self._arrived:
            self._core.scheduler.add(sequence)
        self._arrived.clear()

    def _sweep(self) -> None:
        """Take aborted and abandoned requests out."""
        self._take_arrivals()
        scheduler = self._core.scheduler
        everyone = [*scheduler.running, *scheduler.waiting]
        unwanted = [s for s in everyone if s.abort_requested or _abandoned(s)]
        if not unwanted:
            return
        self._core.drop(set(unwanted))
        for sequence in unwanted:
            self._deliver(sequence, FinishReason.ABORT)

    def _deliver(self, sequence: Sequence, reason: FinishReason) -> None:
        self._open.pop(sequence.order, None)
        if not _abandoned(sequence):
            sequence.future.set_result(sequence.result(reason, self._tokenizer))

    def _fail(self, error: Exception) -> None:
        everyone = [*self._core.scheduler.clear(), *self._arrived]
        self._arrived.clear()
        for sequence in everyone:
            self._open.pop(sequence.order, None)
            if _abandoned(sequence):
                continue
            sequence.future.set_exception(_as_engine_error(error, "a generation step"))
        # Nothing would start a driver for those who came while the step ran.
        self._scoring.fail(_as_engine_error(error, "a generation step"))


def _as_engine_error(error: Exception, what: str) -> EngineError:
    known = isinstance(error, EngineError)
    said = str(error) if known else f"{what} failed: {type(error).__name__}: {error}"
    (failure := EngineError(said)).__cause__ = error
    return failure


def _abandoned(sequence: Sequence) -> bool:
    """Nobody waits for it any more."""
    return sequence.future.done() or sequence.future.get_loop().is_closed()
