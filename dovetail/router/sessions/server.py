"""The routes of sessions: Chat Completions for one agent each, recorded as they are sampled.

    POST /sessions                                  -> {"session_id"}
    POST /sessions/{id}/v1/chat/completions         the base_url of a client is /sessions/{id}/v1
         /sessions/{id}/v1/completions, /v1/models
    GET  /sessions/{id}                             what is recorded
    POST /sessions/{id}/samples                     what is trained on
    DELETE /sessions/{id}

Requests go to the engine as token ids, whatever it is, and come back as such.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from array import array
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.answer import Answer
from dovetail.router.bridge import Bridge
from dovetail.router.control import models_of
from dovetail.router.describe import alone, described
from dovetail.router.dialects.openai_answers import logprobs_of, message_of
from dovetail.router.dialects.openai_shape import Scored, Shape
from dovetail.router.fields import Fields, RequestError, wrong
from dovetail.router.messages import not_taken
from dovetail.router.respond import Json, read, while_connected
from dovetail.router.sessions import wire
from dovetail.router.sessions.ask import (
    Asked,
    chat_asked,
    describe_sampling,
    opening,
    samples_asked,
    text_asked,
    wanted_of,
)
from dovetail.router.sessions.continuation import Prompt, Template, chat_prompt, text_prompt
from dovetail.router.sessions.message_match import loose_tool_call
from dovetail.router.sessions.samples import Collecting, collect
from dovetail.router.sessions.store import SessionLimits, SessionStore
from dovetail.router.sessions.tree import Matches, Message, Session, Turn
from dovetail.router.tool_calls import parse_model_output
from dovetail.router.wanted import Wanted
from dovetail.types import FinishReason, Sample

SERVED: MutableMapping[str, SessionServer] = WeakValueDictionary()
"""By `host:port`: those of this process, for the rollout that opens and ends sessions itself."""


def _chat_of(fields: Fields, bridge: Bridge) -> None:
    chat_asked(fields, bridge.model)
    describe_sampling(fields)


def _text_of(fields: Fields, bridge: Bridge) -> None:
    text_asked(fields, bridge.model)
    describe_sampling(fields)


@dataclass(frozen=True)
class SessionSettings:
    """How sessions answer, record and collect."""

    limits: SessionLimits = field(default_factory=SessionLimits)
    matches: Matches = loose_tool_call
    """Whether a message that a client sent back is the recorded one."""
    by_run: bool = True
    """A session that the run opened samples as the run does, whatever its client asks for."""
    keep_rewritten: bool = False
    """Go on with the recorded ids also where the chat template writes an old turn differently."""
    split_thoughts: bool = False
    """Answer what stands before </think> as `reasoning_content`."""
    collecting: Collecting = field(default_factory=Collecting)


class SessionServer:
    """Sessions over `bridge`, with their routes.

    Example:
        >>> sessions = SessionServer(bridge)  # doctest: +SKIP
        >>> RouterServer(bridge, routes=sessions.routes())  # doctest: +SKIP
    """

    def __init__(self, bridge: Bridge, settings: SessionSettings | None = None) -> None:
        self.bridge, self.settings = bridge, settings or SessionSettings()
        self.store = SessionStore(self.settings.limits)

    def collect(self, session: Session, base: Sample, **more: Any) -> list[Sample]:
        """The samples of what a session recorded: see `samples.collect`."""
        how = self.settings.collecting
        return collect(session, base, self.bridge.tokenizer, how, **more)

    def routes(self) -> list[BaseRoute]:
        """All of them. A client's base_url may or may not end with /v1, and with one that does some
        add another."""
        here = "/sessions/{session_id}"
        routes: list[BaseRoute] = [
            Route("/sessions", self._open, methods=["POST"]),
            Route(here, self._show, methods=["GET"]),
            Route(here, self._end, methods=["DELETE"]),
            Route(f"{here}/samples", self._samples, methods=["POST"]),
        ]
        for version in ("", "/v1", "/v1/v1"):
            base = here + version
            routes += [
                Route(f"{base}/chat/completions", self._chat, methods=["POST"]),
                Route(f"{base}/completions", self._complete, methods=["POST"]),
                Route(f"{base}/models", self._models, methods=["GET"]),
            ]
        return routes

    @described("Open a session", alone(opening))
    async def _open(self, request: Request) -> Response:
        wanted = await read(request, opening)
        session = self.store.open(
            wanted.sampling,
            session_id=wanted.session_id,
            max_context_len=wanted.max_context_len,
            evaluation=wanted.evaluation,
        )
        return Json({"session_id": session.session_id})

    @described("What a session recorded")
    async def _show(self, request: Request) -> Response:
        return Json(wire.record_of(self._session(request)))

    @described("End a session")
    async def _end(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        ended = self.store.end(session_id)
        if ended is None:
            raise RequestError(f"no session {session_id!r} is open here", status=404)
        return Json({"session_id": session_id, "deleted": True})

    @described("What is trained on of a session", alone(samples_asked))
    async def _samples(self, request: Request) -> Response:
        session = self._session(request)
        agent, most = await read(request, samples_asked)
        try:
            # Users' functions may take their time.
            samples = await asyncio.to_thread(
                self.collect,
                session,
                Sample(session_id=session.session_id, metadata=dict(agent)),
                max_seq_len=most,
                agent=agent,
            )
        except Exception as error:
            message = f"the session's samples were not made: {type(error).__name__}: {error}"
            raise RequestError(message, status=422) from error
        return Json(wire.samples_of(session, samples))

    @described("The model of a session, in OpenAI's form")
    async def _models(self, request: Request) -> Response:
        self._session(request)
        return Json(models_of(self.bridge))

    @described("Answer a conversation and record it, in OpenAI's form", _chat_of)
    async def _chat(self, request: Request) -> Response:
        session = self._session(request)
        asked = await read(request, lambda fields: chat_asked(fields, self.bridge.model))
        prompt = self._chat_prompt(session, asked)
        return await self._respond(request, session, asked, prompt)

    @described("Continue a prompt and record it, in OpenAI's form", _text_of)
    async def _complete(self, request: Request) -> Response:
        session = self._session(request)
        asked = await read(request, lambda fields: text_asked(fields, self.bridge.model))
        try:
            prompt = text_prompt(session, asked.prompt, self.bridge.tokenizer)
        except OverflowError as error:
            raise wrong("prompt", asked.prompt, "token ids of this model") from error
        return await self._respond(request, session, asked, prompt)

    async def _respond(
        self, request: Request, session: Session, asked: Asked, prompt: Prompt
    ) -> Response:
        self._room(session, prompt)

        async def work() -> wire.Reply:
            try:
                return await self._answered(session, asked, prompt)
            except asyncio.CancelledError:
                if not session.closed:
                    raise
                raise RequestError(f"session {session.session_id!r} is over", status=410) from None

        if not asked.stream:
            return Json(wire.completion(await while_connected(request, work())))
        return wire.streamed(work())

    async def _answered(self, session: Session, asked: Asked, prompt: Prompt) -> wire.Reply:
        """Generate and record one turn."""
        with self.store.working(session) as number:
            ids = prompt.ids()
            wanted = wanted_of(asked, session, number, by_run=self.settings.by_run)
            wanted = self._fitted(wanted, self._room(session, prompt), session)
            answer = await self.bridge.answer(ids, wanted, f"{session.session_id}.{number}")
            if answer.finish is FinishReason.ABORT:
                # The rollout is over, and with it the agent's run.
                session.aborted = True
                raise RequestError(f"session {session.session_id!r} was aborted", status=410)
            chat = bool(asked.messages)
            message = self._message(asked, answer) if chat else None
            turn = self._turn(session, prompt, answer, message)
            self.store.record(session, turn)
            return self._reply(asked, turn, answer, message, ids)

    def _reply(
        self,
        asked: Asked,
        turn: Turn,
        answer: Answer,
        message: Message | None,
        prompt_ids: list[int],
    ) -> wire.Reply:
        shape = Shape(
            chat=message is not None,
            logprobs=asked.logprobs,
            model=asked.model,
            rid=turn.response_id,
            created=int(turn.made_at),
            usage=asked.usage,
        )
        told = logprobs_of(answer, shape, self.bridge, Scored()) if shape.logprobs else None
        return wire.Reply(asked, turn, answer, message, prompt_ids, shape, told)

    def _turn(
        self, session: Session, prompt: Prompt, answer: Answer, message: Message | None
    ) -> Turn:
        ended = isinstance(answer.matched, int)
        decode = self.bridge.tokenizer.decode
        return Turn(
            number=len(session.turns),
            parent=prompt.parent,
            asked=list(prompt.asked),
            answer=message,
            text=prompt.text,
            said=decode(list(answer.token_ids), skip_special_tokens=False),
            shown=answer.text,
            ending=decode([answer.token_ids[-1]], skip_special_tokens=False) if ended else "",
            context_ids=array("q", prompt.context_ids),
            output_ids=array("q", answer.token_ids),
            logprobs=array("d", answer.logprobs),
            weight_versions=[str(span.weight_version) for span in answer.spans],
            finish_reason="length" if answer.finish is FinishReason.LENGTH else "stop",
            response_id=f"{'chatcmpl' if message else 'cmpl'}-{uuid.uuid4().hex}",
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            made_at=time.time(),
            routed_experts=answer.routed_experts,
        )

    def _message(self, asked: Asked, answer: Answer) -> Message:
        """The assistant's message, calls and thoughts taken out of its text."""
        parsed = parse_model_output(
            answer.text,
            tools=asked.tools,
            reasoning_parser="any" if self.settings.split_thoughts else None,
        )
        return message_of(parsed)

    def _chat_prompt(self, session: Session, asked: Asked) -> Prompt:
        template = Template(self.bridge.tokenizer, asked.tools, asked.options)
        settings = self.settings
        try:
            return chat_prompt(
                session,
                asked.messages,
                template,
                settings.matches,
                rewritten=settings.keep_rewritten,
            )
        except RequestError:
            raise
        except Exception as error:
            raise not_taken(self.bridge.model, asked.messages, error) from error

    def _room(self, session: Session, prompt: Prompt) -> int | None:
        """How many tokens the answer may have; None: there is no bound.

        Raises:
            RequestError: none.
        """
        bounds = (session.max_context_len, self.bridge.max_context_len)
        known = [bound for bound in bounds if bound is not None]
        if not known:
            return None
        before = 0 if prompt.parent is None else prompt.parent.end
        asked = before + len(prompt.context_ids)
        if asked >= min(known):
            session.full = True
            raise RequestError(
                f"the model's maximum context length is {min(known)} tokens; the messages have "
                f"{asked} (context_length_exceeded)",
                field="messages",
                got=f"{asked} tokens",
                expected=f"fewer than {min(known)}",
            )
        return min(known) - asked

    def _fitted(self, wanted: Wanted, room: int | None, session: Session) -> Wanted:
        limit = wanted.sampling.max_new_tokens
        if room is not None:
            limit = room if wanted.to_the_end else min(room, limit)
        return dataclasses.replace(
            wanted,
            sampling=dataclasses.replace(wanted.sampling, max_new_tokens=limit),
            to_the_end=wanted.to_the_end and room is None,
            routed_experts=self.bridge.routed_experts,
            session_id=session.session_id,
        )

    def _session(self, request: Request) -> Session:
        return self.store.find(request.path_params["session_id"])


__all__ = ["SessionServer", "SessionSettings"]
