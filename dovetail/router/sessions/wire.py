"""What a session's clients get: completions whole and as streams, records, samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import StreamingResponse

from dovetail.router.answer import Answer
from dovetail.router.dialects.openai_answers import usage_of
from dovetail.router.dialects.openai_shape import Shape
from dovetail.router.fields import RequestError
from dovetail.router.respond import failure_body
from dovetail.router.sessions.ask import Asked
from dovetail.router.sessions.tree import Message, Session, Turn
from dovetail.types import Sample

_SIGN_OF_LIFE_S = 15.0
"""A client or a proxy may give up on a stream that is silent for long."""


@dataclass(frozen=True)
class Reply:
    """One answered request."""

    asked: Asked
    turn: Turn
    answer: Answer
    message: Message | None
    """None for a plain completion."""
    prompt_ids: Sequence[int]
    shape: Shape
    logprobs: Mapping[str, Any] | None
    """Those of the sampled tokens, where they are asked for."""

    @property
    def finish_reason(self) -> str:
        """stop, length or tool_calls."""
        called = self.message is not None and self.message.get("tool_calls")
        return "tool_calls" if called else self.turn.finish_reason


def completion(reply: Reply) -> dict[str, Any]:
    """The whole answer."""
    choice: dict[str, Any] = {"index": 0, **_content(reply), "finish_reason": reply.finish_reason}
    choice["logprobs"] = reply.logprobs
    body = {**reply.shape.envelope([choice], chunk=False), "usage": _usage(reply)}
    if reply.asked.token_ids:
        choice["token_ids"] = list(reply.answer.token_ids)
        body["prompt_token_ids"] = list(reply.prompt_ids)
    return {**body, "weight_version": str(reply.answer.weight_version)}


def streamed(work: Coroutine[Any, Any, Reply]) -> StreamingResponse:
    """The answer as events, once it is whole: what it says may be calls, which are no text."""

    async def lines() -> AsyncIterator[bytes]:
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=_SIGN_OF_LIFE_S))[0]:
                yield b": the answer is being made\n\n"
            for chunk in _chunks(task.result()):
                yield b"data: " + orjson.dumps(chunk) + b"\n\n"
        except RequestError as error:
            yield b"data: " + orjson.dumps(failure_body(error)) + b"\n\n"
        finally:
            task.cancel()
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def record_of(session: Session) -> dict[str, Any]:
    """Everything that a session recorded."""
    return {
        "session_id": session.session_id,
        "evaluation": session.evaluation,
        "requests": session.asked,
        "full": session.full,
        "records": [_record(turn) for turn in session.turns],
    }


def samples_of(session: Session, samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as JSON, and why there are none."""
    reason = None
    if not samples:
        reason = "all_truncated" if session.turns else "no_records"
    plain = [{k: v for k, v in sample.to_dict().items() if v is not None} for sample in samples]
    return {"session_id": session.session_id, "samples": plain, "empty_reason": reason}


def _record(turn: Turn) -> dict[str, Any]:
    return {
        "number": turn.number,
        "parent": None if turn.parent is None else turn.parent.number,
        "response_id": turn.response_id,
        "messages": list(turn.asked),
        "answer": turn.answer,
        "text": turn.shown,
        "prompt_token_ids": turn.context_ids.tolist(),
        "token_ids": turn.output_ids.tolist(),
        "logprobs": turn.logprobs.tolist(),
        "weight_versions": turn.weight_versions,
        "finish_reason": turn.finish_reason,
        "made_at": turn.made_at,
    }


def _content(reply: Reply) -> dict[str, Any]:
    return {"text": reply.answer.text} if reply.message is None else {"message": reply.message}


def _chunks(reply: Reply) -> Iterator[dict[str, Any]]:
    last = {"index": 0, "finish_reason": reply.finish_reason, "logprobs": None}
    first = {"index": 0, "finish_reason": None, "logprobs": reply.logprobs}

    def chunk(*choices: dict[str, Any]) -> dict[str, Any]:
        return reply.shape.envelope(list(choices), chunk=True)

    if reply.message is None:
        yield chunk({**first, "text": reply.answer.text})
        yield chunk({**last, "text": ""})
    else:
        delta = dict(reply.message)
        calls = [{"index": i, **call} for i, call in enumerate(delta.pop("tool_calls", []))]
        yield chunk({**first, "delta": delta})
        if calls:
            yield chunk({**first, "logprobs": None, "delta": {"tool_calls": calls}})
        yield chunk({**last, "delta": {}})
    if reply.shape.usage:
        yield {**chunk(), "usage": _usage(reply)}


def _usage(reply: Reply) -> dict[str, Any]:
    return usage_of([reply.answer], reply.shape)
