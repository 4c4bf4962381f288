"""What answers at an address that somebody gave: an engine, one of another kind, none, or nothing.
Asked before a run attaches to it, and of engines that are late."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import aiohttp
import orjson

from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.types.errors import EngineError

_ASKED = (
    # `dovetail serve` answers both; it is spoken to as SGLang is.
    ("sglang", "/model_info", {"model_path", "weight_version"}),
    ("vllm", "/version", {"version"}),
)
"""What an engine speaks, a route that only it has, and keys of its answer there."""
_SPEAKS = {"sglang": "SGLang, or dovetail serve", "vllm": "vLLM"}
_ADDRS = "--rollout-external-engine-addrs (TOML: engine.rollout_external_engine_addrs)"
_NO_TOKEN = (401, 403)


class Answer(StrEnum):
    """What came of asking."""

    ENGINE = "engine"
    OTHER = "other"
    """A server, but none of an engine."""
    CLOSED = "closed"
    """It wants a token, or another one."""
    NOTHING = "nothing"
    """Nothing listens there."""
    UNSURE = "unsure"
    """No answer yet, or that it is not ready."""


@dataclass(frozen=True, slots=True)
class Found:
    """Who is at an address."""

    answer: Answer
    said: str
    """What it answered, for a message."""
    dialect: str | None = None
    """Of an engine: `sglang` or `vllm`."""

    def unfit(self, url: str, dialect: str) -> str | None:
        """Why a run can't use it, and the cure; None where it can, or may in a moment."""
        want = f"expected a server of {_SPEAKS[dialect]}"
        if self.answer is Answer.OTHER:
            return f"what listens at {url} is no engine: {self.said}; {want}; correct {_ADDRS}"
        if self.answer is Answer.CLOSED:
            return (
                f"{url} wants a token, or another one: {self.said}; put it into an environment "
                "variable and name that: --engine-token-env NAME (TOML: engine.engine_token_env)"
            )
        if self.dialect in (None, dialect):
            return None
        return (
            f"{url} is a server of {_SPEAKS[str(self.dialect)]}: {self.said}; {want}; use "
            f"--rollout-engine {self.dialect} (TOML: engine.rollout_engine), or correct {_ADDRS}"
        )

    def stranger(self, url: str, dialect: str) -> str | None:
        """Why a run that goes on can't let it in; None where it can, or may."""
        if self.answer is Answer.NOTHING:
            return f"nothing listens there ({self.said})"
        if self.answer is Answer.OTHER:
            return f"what listens there is no engine: {self.said}"
        if self.answer is Answer.CLOSED:
            return f"it wants the token of the run's engines (--engine-token-env): {self.said}"
        if self.dialect in (None, dialect):
            return None
        return f"it is a server of {_SPEAKS[str(self.dialect)]}, not of {_SPEAKS[dialect]}"

    def absent(self, url: str) -> str | None:
        """Why there is nothing to attach to, and the cure; None where something listens."""
        if self.answer is not Answer.NOTHING:
            return None
        return (
            f"nothing listens at {url} ({self.said}); start the engine first, correct {_ADDRS}, "
            "or have the run wait for one that still starts: --engine-start-timeout-s 600 "
            "(TOML: engine.engine_start_timeout_s)"
        )


async def identify(url: str, token: str | None, timeout_s: float) -> Found:
    """Ask who is there, `timeout_s` seconds at most for each of two questions. Never raises."""
    http, said = HttpClient(url, token, timeout_s), []
    try:
        for dialect, path, keys in _ASKED:
            found = await _ask(http, dialect, path, keys)
            if found.answer is not Answer.OTHER:
                return found
            said.append(found.said)
    finally:
        await http.close()
    return Found(Answer.OTHER, ", ".join(said))


async def condition(url: str, token: str | None, timeout_s: float) -> str:
    """What a look at an engine that does not answer yet finds, in words. Never raises."""
    http = HttpClient(url, token, timeout_s)
    try:
        await http.tell("/health", method="GET")
    except EngineError as error:
        found = _refused("/health", error)
        return f"nothing listens at {url} yet" if found.answer is Answer.NOTHING else found.said
    finally:
        await http.close()
    return "GET /health is answered"


async def _ask(http: HttpClient, dialect: str, path: str, keys: set[str]) -> Found:
    try:
        answer = await http.get(path)
    except EngineError as error:
        return _refused(path, error)
    shown = f"GET {path} answered {orjson.dumps(answer).decode()[:200]}"
    if isinstance(answer, dict) and not keys.isdisjoint(answer):
        return Found(Answer.ENGINE, shown, dialect)
    return Found(Answer.OTHER, shown)


def _refused(path: str, error: EngineError) -> Found:
    cause = error.__cause__
    if isinstance(error, EngineRefusedError):
        said = f"GET {path} answered with status {error.status}"
        if error.status in _NO_TOKEN:
            return Found(Answer.CLOSED, said)
        return Found(Answer.UNSURE if error.status >= 500 else Answer.OTHER, said)
    if isinstance(cause, aiohttp.ClientConnectorError):
        return Found(Answer.NOTHING, cause.strerror or str(cause.os_error))
    # One that breaks off may be about to start; one that speaks otherwise is no engine.
    if isinstance(cause, ValueError | aiohttp.ClientResponseError):
        return Found(Answer.OTHER, f"GET {path} was answered with what is no JSON over HTTP")
    return Found(Answer.UNSURE, str(error))
