"""What adapters share: sessions, the way to the router's /generate, and the record of each turn.

    POST with the session's id as API key --translate--> messages, tools --chat template--> ids
        --/generate--> ids with logprobs --TrajectoryManager--> --parse--> the protocol's answer

Served by one thread's event loop (`run_app_in_thread`), while rollouts open and finish sessions
from another.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from dovetail.compat.agent.parsing import (
    ParsedModelOutput,
    json_arguments,
    parse_model_output,
    tool_call_dict,
)
from dovetail.compat.agent.trajectory import TrajectoryManager, TurnRecord
from dovetail.router.messages import flatten_content, for_template
from dovetail.types.sample import Sample

log = logging.getLogger(__name__)

__all__ = [
    "BaseAdapter",
    "Reply",
    "RequestRefused",
    "Session",
    "TurnRecord",
    "flatten_content",
    "json_arguments",
    "request_session_id",
    "sid_from_bearer",
    "tool_call_dict",
]

_BODY_BYTES = 64 << 20
_DEFAULT_MAX_NEW_TOKENS = 4096
_FAREWELL_S = 5.0
_POLL_S = 0.02


class RequestRefused(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass
class Session:
    """One agent's run."""

    session_id: str
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    max_context_tokens: int = 0
    """Most tokens of prompt and response; 0: no limit."""
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)
    closed: bool = False


@dataclass
class Asked:
    """A request, translated."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """What the request sets, under SGLang's names."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    model: str = "policy"
    stream: bool = False


@dataclass
class Reply:
    """A response, taken apart, with its turn."""

    parsed: ParsedModelOutput
    turn: TurnRecord
    message: dict[str, Any]
    """The assistant's chat message."""

    @property
    def finish_reason(self) -> str:
        """stop, length or tool_calls."""
        return "tool_calls" if self.parsed.tool_calls else self.turn.finish_reason

    @property
    def manager_message(self) -> dict[str, Any]:
        """Another name of `message`."""
        return self.message


class BaseAdapter:
    """A protocol in front of the router; `app` is the server.

    Args:
        tokenizer: renders and decodes.
        sglang_url: the router, `http://host:port`.
        tool_parser, reasoning_parser: see `parse_model_output`.
        fork_threshold_tokens: see `TrajectoryManager`.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        sglang_url: str,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        fork_threshold_tokens: int | None = None,
    ) -> None:
        self.tokenizer, self.sglang_url = tokenizer, sglang_url.rstrip("/")
        self.tool_parser, self.reasoning_parser = tool_parser, reasoning_parser
        self.manager = TrajectoryManager(fork_threshold_tokens)
        self.sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._client: aiohttp.ClientSession | None = None
        self.app = web.Application(client_max_size=_BODY_BYTES)
        self.app.cleanup_ctx.append(self._connections)
        self.app.router.add_get("/health", _healthy)
        self.add_routes(self.app.router)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """The protocol's own addresses."""
        raise NotImplementedError

    def open_session(
        self,
        session_id: str,
        *,
        sampling_defaults: Mapping[str, Any] | None = None,
        max_context_tokens: int | None = None,
    ) -> Session:
        """Take requests whose API key is `session_id`; an open session is taken over.

        `sampling_defaults`: SGLang's sampling parameters, where a request says nothing.
        """
        session = Session(session_id, dict(sampling_defaults or {}), max_context_tokens or 0)
        with self._lock:
            return self.sessions.setdefault(session_id, session)

    async def shutdown_session(self, session_id: str, wait_timeout: float = _FAREWELL_S) -> None:
        """Refuse new requests and end those under way; the turns so far stay."""
        with self._lock:
            session = self.sessions.get(session_id)
        if session is None:
            return
        session.closed = True
        for task in list(session.in_flight):
            task.get_loop().call_soon_threadsafe(task.cancel)
        end = asyncio.get_running_loop().time() + wait_timeout
        while session.in_flight and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)

    async def finish_session(
        self,
        session_id: str,
        *,
        base_sample: Sample | None = None,
        reward: Any = None,
        extra_metadata: Mapping[str, Any] | None = None,
        wait_timeout: float = _FAREWELL_S,
    ) -> list[Sample]:
        """End the session and give its samples; [] if it is over, or without `base_sample`."""
        await self.shutdown_session(session_id, wait_timeout)
        with self._lock:
            known = self.sessions.pop(session_id, None)
        if known is None or base_sample is None:
            self.manager.drop(session_id)
            return []
        samples = self.manager.get_trajectory(session_id, base_sample=base_sample, reward=reward)
        for sample in samples:
            response_ids = sample.tokens[len(sample.tokens) - sample.response_length :]
            sample.response = str(self.tokenizer.decode(response_ids))
            sample.metadata |= dict(extra_metadata or {})
        return samples

    async def drop_session(self, session_id: str, wait_timeout: float = _FAREWELL_S) -> None:
        """End the session and forget its turns."""
        await self.finish_session(session_id, wait_timeout=wait_timeout)

    async def answer(self, request: web.Request, asked: Asked) -> Reply:
        """Generate, record the turn and take the response apart.

        Raises:
            RequestRefused: an unknown session, or a prompt that fills the context.
        """
        session = self._session_of(request)
        task = asyncio.current_task()
        assert task is not None
        session.in_flight.add(task)
        try:
            prompt_ids = self.render(asked)
            sampling = self._sampling(session, asked, len(prompt_ids))
            turn = await self._generate(session.session_id, prompt_ids, sampling)
            reply = self._taken_apart(asked, turn)
            if not session.closed:
                self.manager.record_turn(
                    session.session_id,
                    turn=turn,
                    prompt_messages=asked.messages,
                    response_message=reply.message,
                )
            return reply
        finally:
            session.in_flight.discard(task)

    def render(self, asked: Asked) -> list[int]:
        """The prompt's ids."""
        messages = [for_template(message) for message in asked.messages]
        return list(
            self.tokenizer.apply_chat_template(
                messages,
                tools=asked.tools or None,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
                **asked.template_kwargs,
            )
        )

    def _session_of(self, request: web.Request) -> Session:
        session_id = request_session_id(request)
        with self._lock:
            session = self.sessions.get(session_id or "")
        if session is None or session.closed:
            state = "is over" if session is not None else "is not open"
            raise RequestRefused(
                401,
                "authentication_error",
                f"session {session_id!r} {state}; the API key of a request is its session's id",
            )
        return session

    def _sampling(self, session: Session, asked: Asked, prompt_length: int) -> dict[str, Any]:
        sampling = {**session.sampling_defaults, **asked.sampling}
        most = sampling.get("max_new_tokens") or _DEFAULT_MAX_NEW_TOKENS
        if session.max_context_tokens:
            room = session.max_context_tokens - prompt_length
            if room <= 0:
                raise RequestRefused(
                    400,
                    "invalid_request_error",
                    f"prompt is too long: {prompt_length} tokens, the context has "
                    f"{session.max_context_tokens}",
                )
            most = min(most, room)
        named = {name: value for name, value in sampling.items() if value is not None}
        return {**named, "max_new_tokens": most, "no_stop_trim": True}

    async def _generate(
        self, session_id: str, prompt_ids: list[int], sampling: Mapping[str, Any]
    ) -> TurnRecord:
        rid = uuid.uuid4().hex
        payload = {
            "rid": rid,
            "input_ids": prompt_ids,
            "sampling_params": dict(sampling),
            "return_logprob": True,
        }
        headers = {"X-SMG-Routing-Key": session_id}
        try:
            meta = (await self._post("/generate", payload, headers))["meta_info"]
        except asyncio.CancelledError:
            # Whoever asked is gone; the engine should not go on for nobody.
            self._abort = asyncio.ensure_future(self._post_quietly("/abort_request", {"rid": rid}))
            raise
        pairs = meta.get("output_token_logprobs") or []
        reason = meta.get("finish_reason") or {}
        reason = reason.get("type", "stop") if isinstance(reason, Mapping) else str(reason)
        version = meta.get("weight_version")
        return TurnRecord(
            prompt_ids=prompt_ids,
            output_ids=[pair[1] for pair in pairs],
            finish_reason="length" if reason in ("length", "abort") else "stop",
            output_log_probs=[pair[0] for pair in pairs],
            weight_version=None if version is None else str(version),
        )

    async def _post(self, path: str, payload: Any, headers: Mapping[str, str]) -> Any:
        assert self._client is not None, "the adapter's app is not running"
        url = self.sglang_url + path
        async with self._client.post(url, json=payload, headers=headers) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise RequestRefused(answer.status, "api_error", f"{url}: {text[:500]}")
            return json.loads(text)

    async def _post_quietly(self, path: str, payload: Any) -> None:
        try:
            await self._post(path, payload, {})
        # The router may be gone as well, and nothing depends on this.
        except (RequestRefused, aiohttp.ClientError, ValueError) as error:
            log.debug("%s: %s", path, error)

    def _taken_apart(self, asked: Asked, turn: TurnRecord) -> Reply:
        # Special tokens may be what delimits calls; those that end a turn are no part of it.
        text = str(self.tokenizer.decode(turn.output_ids, skip_special_tokens=False))
        for ending in _endings(self.tokenizer):
            text = text.removesuffix(ending)
        parsed = parse_model_output(
            text,
            tools=asked.tools,
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
        )
        message: dict[str, Any] = {"role": "assistant", "content": parsed.text}
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message["tool_calls"] = parsed.tool_calls
        return Reply(parsed, turn, message)

    async def _connections(self, app: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as self._client:
            yield


def request_session_id(request: web.Request) -> str | None:
    """The session's id: the bearer token, or the API key."""
    return sid_from_bearer(request.headers.get("Authorization")) or request.headers.get("x-api-key")


def sid_from_bearer(header: str | None) -> str | None:
    """The token of an Authorization header."""
    kind, _, token = (header or "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


async def read_body(request: web.Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        RequestRefused: it is none.
    """
    try:
        body = await request.json()
    except ValueError as error:
        raise RequestRefused(400, "invalid_request_error", f"not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise RequestRefused(400, "invalid_request_error", "a JSON object with messages is needed")
    return body


async def _healthy(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def _endings(tokenizer: Any) -> Sequence[str]:
    ending = getattr(tokenizer, "eos_token", None)
    return [ending] if isinstance(ending, str) and ending else []
