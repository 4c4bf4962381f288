"""Middleware of slime and miles that keeps what texts are made of: `RadixTreeMiddleware`.

    POST /generate -> the known beginning of its text as token ids -> engine -> the answer is kept
    POST /retrieve_from_text -> token ids, logprobs and loss mask of a text

So a client that handles texts only, turn by turn, trains on the tokens that were sampled.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.router.fields import Fields, RequestError, is_ids
from dovetail.router.fields import Shape as FieldShape
from dovetail.router.respond import Json, failure, fields_of
from dovetail.router.text_cache import TextCache, Trajectory
from dovetail.types.ports import Tokenizer

log = logging.getLogger(__name__)

TRIES = 5
RETRY_S = 30.0
"""Between two tries of a generation that its engine broke off: weights may be on their way."""
_MOST_BYTES = 4_000_000
"""Of a body that is looked into: nobody else is served meanwhile. Larger ones pass as they are."""
_NOT_TEXT = ("image_data", "video_data", "audio_data", "input_embeds", "stream")
_TEXT = FieldShape(
    {"type": "string", "minLength": 1, "description": "A prompt with what was answered to it."}
)


@dataclass
class _Asked:
    """A generation request that is kept."""

    text: str | None
    """None: it came as ids."""
    known: Trajectory
    body: bytes


class RadixTreeMiddleware:
    """ASGI middleware over one router; the cache is `router.radix_tree` from then on.

    Kept are answers to single prompts, as text or as ids, that are not streamed and have no images
    and the like; the others pass as they are. A generation that an engine broke off without being
    asked to is made again, `TRIES` times in all.

    Args:
        app: what stands behind it.
        router: has `args` and `tokenizer`.
    """

    def __init__(self, app: ASGIApp, *, router: Any) -> None:
        self.app, self.router, self.args = app, router, router.args
        self.radix_tree = TextCache(lambda: self.tokenizer)
        router.radix_tree = self.radix_tree

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        tokenizer: Tokenizer = self.router.tokenizer
        return tokenizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else None
        if path == "/generate" and scope["method"] in ("POST", "PUT"):
            await self._generate(scope, receive, send)
        elif path == "/retrieve_from_text" and scope["method"] == "POST":
            try:
                answer = await self._retrieve(Request(scope, receive))
            except ClientDisconnect:
                return
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _retrieve(self, request: Request) -> Json:
        try:
            # What is large is read on another thread; the cache belongs to this one.
            return Json(self._found(await fields_of(request)))
        except RequestError as error:
            return failure(error)

    def _found(self, fields: Fields) -> dict[str, Any]:
        text = fields.raw("text", shape=_TEXT)
        if not isinstance(text, str) or not text:
            raise RequestError(
                "text: expected a string, a prompt with what was answered to it",
                field="text",
                expected="a string",
            )
        with_logprobs = fields.flag("return_logp", False)
        known = self.radix_tree.whole(text)
        found = {
            "tokens": known.tokens,
            "response": text,
            "loss_mask": known.loss_mask,
            "token_length": len(known.tokens),
            "loss_mask_length": len(known.loss_mask),
        }
        return {**found, "rollout_logp": known.logprobs} if with_logprobs else found

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        asked = self._asked(body)
        if asked is None:
            await self.app(scope, _replayed(body, receive), send)
            return
        held = await self._answered(_sized(scope, asked.body), asked.body, receive)
        if held is None:
            return
        self._keep(asked, held)
        for message in held.messages:
            await send(message)

    async def _answered(self, scope: Scope, body: bytes, receive: Receive) -> _Held | None:
        """The last try; None: the client is gone."""
        before = _aborts_of(self.router)
        for attempt in range(1, TRIES + 1):
            held = _Held()
            await self.app(scope, _replayed(body, receive), held.send)
            asked_to = before is None or _aborts_of(self.router) != before
            if held.finish != "abort" or asked_to or attempt == TRIES:
                return held
            log.info("an engine broke a generation off (%d of %d tries)", attempt, TRIES)
            if await _left(receive, RETRY_S):
                return None
        raise AssertionError("the last try returns")

    def _asked(self, body: bytes) -> _Asked | None:
        """What of it is kept; None: it passes as it is, and is refused where it is wrong."""
        if len(body) > _MOST_BYTES:
            return None
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(request, dict) or _passes(request):
            return None
        text, ids = request.get("text"), request.get("input_ids")
        known = self._prompt(request["text"]) if ids is None else Trajectory(ids, [], [])
        if known is None:
            return None
        changed = {name: value for name, value in request.items() if name != "text"}
        changed |= {"input_ids": known.tokens, "return_logprob": True}
        return _Asked(text, known, orjson.dumps(changed))

    def _prompt(self, text: str) -> Trajectory | None:
        try:
            return self.radix_tree.prompt(text)
        except RequestError:
            return None

    def _keep(self, asked: _Asked, held: _Held) -> None:
        meta = held.meta
        pairs = meta.get("output_token_logprobs")
        if not pairs or not isinstance(held.answer.get("text"), str):
            return
        text, known, version = asked.text, asked.known, meta.get("weight_version")
        if text is None:
            text = self.tokenizer.decode(known.tokens, skip_special_tokens=False)
            known = self.radix_tree.of_ids(text, known.tokens)
        made = [(float(value), int(token)) for value, token, *_ in pairs]
        if not self.radix_tree.remember(text, known, held.answer["text"], made, version):
            log.warning(
                "an answer of %d tokens is too large for the cache of texts (%d bytes): it can't "
                "be retrieved by its text",
                len(made),
                self.radix_tree.max_bytes,
            )


class _Held:
    """An answer that waits for being looked at."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._answer: dict[str, Any] | None = None

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON object of a success; else nothing."""
        if self._answer is None:
            body = b"".join(one.get("body", b"") for one in self.messages)
            good = bool(self.messages) and self.messages[0].get("status") == 200
            try:
                found = orjson.loads(body) if good else {}
            except orjson.JSONDecodeError:
                found = {}
            self._answer = found if isinstance(found, dict) else {}
        return self._answer

    @property
    def meta(self) -> dict[str, Any]:
        """What is said about it."""
        meta = self.answer.get("meta_info")
        return meta if isinstance(meta, dict) else {}

    @property
    def finish(self) -> Any:
        """Why it ended."""
        reason = self.meta.get("finish_reason")
        return reason.get("type") if isinstance(reason, dict) else reason


def _passes(request: dict[str, Any]) -> bool:
    """Whether it is no single prompt of text alone."""
    sampling, text, ids = (request.get(name) for name in ("sampling_params", "text", "input_ids"))
    several = isinstance(sampling, dict) and sampling.get("n", 1) != 1
    prompt = is_ids(ids) if text is None else ids is None and isinstance(text, str) and text
    return several or not prompt or any(request.get(name) for name in _NOT_TEXT)


def _aborts_of(router: Any) -> int | None:
    """How often clients or the run ended requests; None: nobody else can."""
    return getattr(router, "aborts_asked", None)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body at once, then what comes behind it."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def _sized(scope: Scope, body: bytes) -> Scope:
    gone = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in gone]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


async def _left(receive: Receive, seconds: float) -> bool:
    """Whether the client goes away within this time."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    try:
        await asyncio.wait_for(gone(), seconds)
    except TimeoutError:
        return False
    return True
