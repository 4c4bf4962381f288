"""A teacher behind HTTP: samples get its logprobs while others are still made.

kept group --> one request per sample --> server with the least to do --> teacher_log_probs
                      ^       | fault that may pass: another server, after a pause
                      +-------+
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from dovetail.config.leaves import cure
from dovetail.config.sections import DistillationConfig
from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.rollout.teacher_forms import Form, SglangForm, VllmForm, WrongAnswer
from dovetail.types import (
    ConfigError,
    EngineBusyError,
    EngineGoneError,
    Group,
    RolloutError,
    Sample,
)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_COOLING_S = 5.0
"""How long a server that failed is asked only where no other is left."""
_TRIES_AT_START = 3


@dataclass(slots=True)
class _Server:
    url: str
    http: HttpClient
    path: str
    in_flight: int = 0
    asked: int = 0
    cool_at: float = 0.0
    """When it is taken for well again."""


class TeacherClient:
    """Asks the servers of a teacher.

    Args:
        vocab_size: ids that the policy's tokenizer knows.
        token: bearer token; it is in no message.
    """

    def __init__(
        self, settings: DistillationConfig, *, vocab_size: int, token: str | None = None
    ) -> None:
        self._settings, self._last_id = settings, vocab_size - 1
        self._form: Form = (
            VllmForm(settings.opd_teacher_model)
            if settings.form == "vllm"
            else SglangForm(self._last_id)
        )
        self._servers = [
            _server(_address(url, self._form), token, settings.opd_teacher_timeout_s)
            for url in settings.opd_teacher_urls
        ]
        self._turn: asyncio.Semaphore | None = None
        self._requests = self._retries = 0
        self._seconds = 0.0

    @classmethod
    def from_config(
        cls,
        settings: DistillationConfig,
        vocab_size: int,
        environment: Mapping[str, str] = os.environ,
    ) -> TeacherClient:
        """With the token that the environment has.

        Raises:
            ConfigError: a variable is named and not set.
        """
        name = settings.opd_teacher_token_env
        token = None if name is None else environment.get(name)
        if name is not None and not token:
            raise ConfigError(
                f"the environment variable {name} of {cure('opd_teacher_token_env')} is not set"
            )
        return cls(settings, vocab_size=vocab_size, token=token)

    async def check(self) -> None:
        """Ask every server about two tokens, the second the last that the policy knows.

        Raises:
            ConfigError: one does not answer, or does not know the tokens.
        """
        try:
            for server in self._servers:
                await self._check(server)
        finally:
            self.metrics()
            await self.close()

    async def _check(self, server: _Server) -> None:
        where = f"the teacher at {server.url} ({cure('opd_teacher_urls')})"
        for attempt in range(_TRIES_AT_START):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_S)
            try:
                await self._ask(server, [0, self._last_id], 1)
                return
            except _Passing as passing:
                fault = passing
            except (WrongAnswer, RolloutError) as error:
                raise ConfigError(
                    f"{where} can't score the policy's tokens, ids 0 to {self._last_id}: {error}"
                ) from error
        raise ConfigError(f"{where} does not answer: {fault}") from fault

    async def teach(self, samples: Iterable[Sample]) -> None:
        """Set `teacher_log_probs` of the samples that have none, all at once.

        Raises:
            RolloutError: the servers don't answer, or answer about other tokens.
        """
        tasks = [asyncio.ensure_future(self._teach(one)) for one in samples if _is_open(one)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def metrics(self) -> dict[str, float]:
        """Since the last call: requests, those beyond the first of a sample, seconds of one."""
        count, retries, seconds = self._requests, self._retries, self._seconds
        self._requests, self._retries, self._seconds = 0, 0, 0.0
        if not count:
            return {}
        return {
            "opd/teacher_requests": float(count),
            "opd/teacher_retries": float(retries),
            "opd/teacher_s": seconds / count,
        }

    async def close(self) -> None:
        """Close the connections; the next request opens them again, on whatever loop runs then."""
        self._turn = None
        for server in self._servers:
            await server.http.close()

    async def _teach(self, sample: Sample) -> None:
        if sample.multimodal_inputs:
            raise RolloutError(
                f"sample {sample.index} has images, and the teacher behind "
                f"{cure('opd_teacher_urls')} reads text only; {cure('opd_teacher_load', 'DIR')}"
            )
        count = min(sample.response_length, len(sample.tokens) - 1)
        known = await self._until_good(sample, count) if count > 0 else []
        # Before a sequence's first token there is nothing to predict it from.
        sample.teacher_log_probs = [0.0] * (sample.response_length - count) + known

    async def _until_good(self, sample: Sample, count: int) -> list[float]:
        draw = random.Random(sample.index or 0).random
        pause_s = _FIRST_PAUSE_S
        tries, turn = self._settings.opd_teacher_retries + 1, self._turns()
        for attempt in range(tries):
            async with turn:
                server = self._pick()
                try:
                    return await self._ask(server, sample.tokens, count)
                except _Passing as fault:
                    server.cool_at = time.monotonic() + _COOLING_S
                    last = str(fault)
                except WrongAnswer as error:
                    raise RolloutError(
                        f"sample {sample.index}: the answer of the teacher at {server.url} can't "
                        f"be used: {error}"
                    ) from error
            if attempt + 1 < tries:
                self._retries += 1
                await asyncio.sleep(pause_s * (0.5 + draw()))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise RolloutError(
            f"sample {sample.index}: the teacher ({cure('opd_teacher_urls')}) gave no logprobs in "
            f"{tries} tries; the last was {last}. Allow more with {cure('opd_teacher_retries')}"
        )

    def _turns(self) -> asyncio.Semaphore:
        if self._turn is None:
            self._turn = asyncio.Semaphore(self._settings.opd_teacher_concurrency)
        return self._turn

    def _pick(self) -> _Server:
        now = time.monotonic()
        return min(self._servers, key=lambda one: (one.cool_at > now, one.in_flight, one.asked))

    async def _ask(self, server: _Server, tokens: list[int], count: int) -> list[float]:
        server.in_flight += 1
        server.asked += 1
        self._requests += 1
        started = time.perf_counter()
        try:
            answer = await server.http.post(server.path, self._form.body(tokens, count))
        except (EngineGoneError, EngineBusyError) as error:
            raise _Passing(str(error)) from error
        except EngineRefusedError as error:
            if error.status >= 500:
                raise _Passing(str(error)) from error
            raise RolloutError(str(error)) from error
        finally:
            server.in_flight -= 1
            self._seconds += time.perf_counter() - started
        return self._form.logprobs(answer, tokens, count)


class _Passing(Exception):
    """A fault that another try may not meet."""


class Lessons:
    """What a rollout asks of its teacher for groups that it keeps, while it makes others.

    Args:
        client: None: there is no teacher to ask.
    """

    def __init__(self, client: TeacherClient | None) -> None:
        self._client = client
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, group: Group) -> None:
        """Ask about a group."""
        if self._client is not None:
            self._tasks.append(asyncio.ensure_future(self._client.teach(group)))

    async def end(self) -> None:
        """Wait for every answer.

        Raises:
            RolloutError: one could not be had.
        """
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        """Ask no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _is_open(sample: Sample) -> bool:
    known = sample.teacher_log_probs
    return known is None or len(known) != sample.response_length


def _server(url: str, token: str | None, timeout_s: float) -> _Server:
    parts = urlsplit(url)
    base = f"{parts.scheme}://{parts.netloc}"
    path = url.removeprefix(base)
    return _Server(url, HttpClient(base, token, timeout_s, name=f"the teacher at {base}"), path)


def _address(url: str, form: Form) -> str:
    parts = urlsplit(url)
    return url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}{form.path}"
