"""Between the server's thread and the engine, which lives on the run's own event loop.

    server's loop                                      run's loop
    answer() --run_coroutine_threadsafe--> engine.generate
       ^  client gone: cancel -----------------> cancelled
       +------------------- result ---------------+

The run's loop stands still while the run trains: requests that come then wait. A loop that runs but
does not react is another matter: somebody blocks it, and may wait for this very answer.

With the engines of a fleet, server and engines share a loop: there is nothing to cross.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import cache
from typing import Any, TypeVar

from dovetail.router.answer import Answer
from dovetail.router.bounded_tokenizer import BoundedTokenizer
from dovetail.router.crossing import Crossing
from dovetail.router.fields import RequestError
from dovetail.router.wanted import Wanted
from dovetail.types import (
    EngineBusyError,
    EngineError,
    EngineGoneError,
    EngineTimeoutError,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    RequestRefusedError,
    RequestTooLongError,
    ScoreRequest,
    ScoreResult,
)
from dovetail.types.ports import Engine, ScoringEngine, Tokenizer

T = TypeVar("T")

_FIRST_PIECE = 16
"""Tokens of a stream's first chunk. Each next one is twice as long, so that the work of taking up
the response again stays in proportion to its length."""


class Bridge:
    """Answers requests from any thread with an engine on another one's loop.

    Args:
        engine: gives the engine; asked on the first request.
        tokenizer: gives the tokenizer.
        model: name of the model, for answers.
        limits: gives the most tokens of prompt plus response, and where token ids end; None where
            that is not known.
        routed_experts: the run trains on the experts of every token; what asks in a form without a
            field for them gets them too.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        tokenizer: Callable[[], Tokenizer],
        *,
        model: str,
        limits: Callable[[], tuple[int | None, int | None]] = lambda: (None, None),
        routed_experts: bool = False,
    ) -> None:
        self._engine, self._tokenizer, self._limits = engine, tokenizer, limits
        self.model, self.routed_experts = model, routed_experts
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread_id: int | None = None
        """The thread that runs the run's loop."""
        self.closing = False
        self.prompt_tokens = self.generated_tokens = self.cached_tokens = 0
        """Of all answers so far."""
        self._crossing = Crossing(lambda: self.closing)
        self._direct: dict[asyncio.Task[Any], bool] = {}
        """Tasks that wait for an engine of this loop -> whether `end` ended them."""
        self._numbers = itertools.count()
        self._bounded: BoundedTokenizer | None = None
        self._open: dict[str, str] = {}
        """Ids of requests under way -> the name that their client gave."""

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for prompts that may fit."""
        if self._bounded is None:
            self._bounded = BoundedTokenizer(self._tokenizer(), self.max_context_len)
        return self._bounded

    @property
    def max_context_len(self) -> int | None:
        """Most tokens of prompt plus response."""
        return self._limits()[0]

    @property
    def vocab_size(self) -> int | None:
        """Where token ids end."""
        return self._limits()[1]

    @property
    def can_score(self) -> bool:
        """Whether the engine scores tokens that are there already."""
        engine = self.engine
        return _has_scores(type(engine)) and getattr(engine, "can_score", True)

    @property
    def weight_version(self) -> int:
        """The engine's, 0 for one that does not count."""
        return int(getattr(self.engine, "weight_version", 0))

    @property
    def in_flight(self) -> list[str]:
        """Names of the requests under way, oldest first."""
        return list(self._open.values())

    def new_rid(self) -> str:
        """A name for a request that came without one."""
        return f"req-{next(self._numbers)}"

    async def answer(self, prompt: Sequence[int], wanted: Wanted, rid: str) -> Answer:
        """Answer one prompt.

        Raises:
            RequestError: the request can never fit, or the engine failed, or the run is ending.
        """
        started = time.perf_counter()
        request = self._request(prompt, wanted, rid)
        result = await self._generate(request, rid)
        answer = Answer(rid, len(prompt)).extended(result, self.weight_version)
        self._count(answer)
        finish = FinishReason(result.finish_reason)
        return answer.worded(self.tokenizer, wanted, finish, time.perf_counter() - started)

    async def stream(
        self, prompt: Sequence[int], wanted: Wanted, rid: str
    ) -> AsyncIterator[Answer]:
        """The answer as far as it has come, again and again, then the finished one.

        Raises:
            RequestError: as `answer`.
        """
        started, size = time.perf_counter(), _FIRST_PIECE
        whole = self._request(prompt, wanted, rid)
        most, answer = whole.sampling.max_new_tokens, Answer(rid, len(prompt))
        while True:
            left = most - len(answer.token_ids)
            part = dataclasses.replace(whole.sampling, max_new_tokens=min(size, left))
            request = dataclasses.replace(
                whole,
                request_id=f"{whole.request_id}.{len(answer.token_ids)}",
                prompt_ids=(*whole.prompt_ids, *answer.token_ids),
                sampling=part,
                num_generated=whole.num_generated + len(answer.token_ids),
            )
            result = await self._generate(request, rid)
            answer = answer.extended(result, self.weight_version)
            ended = FinishReason(result.finish_reason)
            goes_on = ended is FinishReason.LENGTH and len(answer.token_ids) < most
            finish = None if goes_on else ended
            yield answer.worded(self.tokenizer, wanted, finish, time.perf_counter() - started)
            if finish is not None:
                self._count(answer)
                return
            size *= 2

    async def score(
        self, tokens: Sequence[int], start: int, *, temperature: float = 1.0, top: int = 0
    ) -> ScoreResult:
        """The logprobs of `tokens[start:]`, and the `top` most probable tokens at each of them.

        Raises:
            RequestError: the tokens can never fit, or the engine failed.
        """
        engine = self.engine
        assert isinstance(engine, ScoringEngine), "whoever asks has looked at can_score"
        self._check_ids(tokens)
        name = f"score#{next(self._numbers)}"
        request = ScoreRequest(name, tuple(tokens), start, temperature, top)
        try:
            return await self._hop(engine.score(request))
        except EngineError as error:
            raise failed(error) from error

    async def abort(self, rid: str | None = None) -> int:
        """End the requests of this name (None: every request of the engine); how many there
        were."""
        targets = [own for own, name in self._open.items() if rid is None or _is(name, rid)]
        if rid is None:
            await self._hop(self.engine.abort())
        else:
            # What the proxy passed on is known to its engine, under the client's own name, only.
            await self._hop(self.engine.abort([*targets, rid]))
        return len(targets)

    async def _generate(self, request: GenerateRequest, rid: str) -> GenerateResult:
        self._open[request.request_id] = rid
        try:
            return await self._hop(self.engine.generate(request))
        except RequestTooLongError as error:
            raise RequestError(
                str(error), field="max_new_tokens", got=request.sampling.max_new_tokens
            ) from error
        except EngineError as error:
            raise failed(error) from error
        finally:
            self._open.pop(request.request_id, None)

    def _request(self, prompt: Sequence[int], wanted: Wanted, rid: str) -> GenerateRequest:
        self._check_ids(prompt)
        context_len, _ = self._limits()
        sampling = wanted.sampling
        if wanted.to_the_end:
            room = 0 if context_len is None else context_len - len(prompt)
            sampling = dataclasses.replace(sampling, max_new_tokens=max(room, 0))
        return GenerateRequest(
            f"{rid}#{next(self._numbers)}",
            tuple(prompt),
            sampling,
            num_generated=min(wanted.num_generated, len(prompt)),
            return_routed_experts=wanted.routed_experts,
            session_id=wanted.session_id,
        )

    def _check_ids(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise RequestError(
                "the prompt has no tokens", field="prompt", got="[]", expected="one token or more"
            )
        context_len, vocab_size = self._limits()
        if context_len is not None and len(prompt) > context_len:
            raise RequestError(
                f"{len(prompt)} tokens do not fit the context of {context_len}",
                field="prompt",
                got=f"{len(prompt)} tokens",
                expected=f"at most {context_len}",
            )
        if vocab_size is not None and max(prompt) >= vocab_size:
            raise RequestError(
                f"token id {max(prompt)} is none of this model's, which end at {vocab_size - 1}",
                field="prompt",
                got=str(max(prompt)),
                expected=f"ids from 0 to {vocab_size - 1}",
            )

    async def _hop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the run's loop; wait for as long as that stands still."""
        if self.closing or self.loop is None or self.loop.is_closed():
            work.close()
            raise RequestError("the run is ending: no more requests are taken", status=503)
        if asyncio.get_running_loop() is self.loop:
            return await self._here(work)
        return await self._crossing.over(work, self.loop, self.thread_id)

    async def _here(self, work: Coroutine[Any, Any, T]) -> T:
        """The same where the engine lives on this very loop."""
        task = asyncio.current_task()
        assert task is not None, "requests are answered in tasks"
        self._direct[task] = False
        try:
            return await work
        except asyncio.CancelledError:
            if self._direct[task] and task.uncancel() == 0:
                raise RequestError("the run ended meanwhile", status=503) from None
            raise
        finally:
            del self._direct[task]

    def end(self) -> None:
        """On the server's loop: take no more requests, and end those that wait for an engine of
        this loop; the others see for themselves."""
        self.closing = True
        for task in self._direct:
            self._direct[task] = task.cancel()

    def _count(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.generated_tokens += len(answer.token_ids)
        self.cached_tokens += answer.cached_tokens


def failed(error: EngineError) -> RequestError:
    """An engine's failure as its clients see it: 429 and 503 may go better later."""
    if isinstance(error, RequestRefusedError):
        return RequestError(str(error))
    if isinstance(error, EngineBusyError):
        return RequestError(str(error), status=429, retry_after_s=error.retry_after_s)
    if isinstance(error, EngineTimeoutError):
        return RequestError(str(error), status=504)
    if isinstance(error, EngineGoneError):
        return RequestError(f"the engine is gone: {error}", status=503, retry_after_s=1.0)
    return RequestError(f"the engine failed: {error}", status=500)


@cache
def _has_scores(kind: type) -> bool:
    """As isinstance with the protocol, which takes its time, and is asked for every request."""
    return callable(getattr(kind, "score", None))


def _is(name: str, rid: str) -> bool:
    """Several choices of one request are named after it."""
    return name == rid or name.startswith(f"{rid}_")
