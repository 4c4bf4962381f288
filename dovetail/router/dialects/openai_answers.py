"""Answers in OpenAI's form, whole and piece by piece, with calls of tools taken out of the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dovetail.router.answer import Answer
from dovetail.router.bridge import Bridge
from dovetail.router.dialects.openai_scores import prompt_entries
from dovetail.router.dialects.openai_shape import Job, Scored, Shape
from dovetail.router.tool_calls import ParsedModelOutput, parse_model_output, sent_call
from dovetail.types import FinishReason

_CALL, _THOUGHT_END = "<tool_call>", "</think>"


def choice_of(
    index: int, answer: Answer, job: Job, shape: Shape, bridge: Bridge, score: Scored
) -> dict[str, Any]:
    """One choice of a whole answer."""
    choice = _bare(index, answer, shape, bridge, score)
    told = None if shape.prompt_top is None else prompt_entries(job, score.prompt, bridge)
    choice["prompt_logprobs"] = told
    if shape.chat:
        parsed = _parsed(answer.text, shape)
        choice["message"] = message_of(parsed)
        choice["finish_reason"] = _finish(answer, parsed)
    else:
        choice["text"] = answer.text
        choice["prompt_token_ids"] = list(job.prompt)
    return choice


def usage_of(answers: list[Answer], shape: Shape) -> dict[str, Any]:
    """Tokens in and out. Choices of one prompt share it."""
    each = len(answers) // shape.prompts
    prompt = sum(answer.prompt_tokens for answer in answers[::each])
    completion = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers)},
    }


class Told:
    """What the client of a stream knows of one choice."""

    def __init__(self, job: Job, shape: Shape, bridge: Bridge) -> None:
        self.answer = Answer(job.rid, len(job.prompt))
        self._job, self._shape, self._bridge = job, shape, bridge
        self._content = self._reasoning = ""
        self._begun = False

    def more(self, index: int, answer: Answer) -> Iterator[dict[str, Any]]:
        """The choices of the chunks that tell what is new."""
        here = len(self.answer.token_ids)
        new = replace(answer, token_ids=answer.token_ids[here:], logprobs=answer.logprobs[here:])
        self.answer = answer
        choice = _bare(index, new, self._shape, self._bridge, Scored())
        if not self._shape.chat:
            choice["text"] = self._rest(answer.text)
            choice["prompt_token_ids"] = list(self._job.prompt)
            yield choice
            return
        done = answer.finish is not None
        parsed = _parsed(answer.text, self._shape) if done else _begun(answer.text, self._shape)
        delta = self._delta(parsed)
        if not parsed.tool_calls:
            yield {**choice, "delta": delta}
            return
        calls = [
            {"index": place, **call} for place, call in enumerate(map(sent_call, parsed.tool_calls))
        ]
        yield {**choice, "delta": {**delta, "tool_calls": calls}, "finish_reason": None}
        end = _bare(index, replace(new, token_ids=(), logprobs=()), self._shape, self._bridge)
        yield {**end, "delta": {}, "finish_reason": _finish(answer, parsed)}

    def _delta(self, parsed: ParsedModelOutput) -> dict[str, Any]:
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        self._begun = True
        delta["content"] = self._rest(parsed.text)
        if len(parsed.reasoning) > len(self._reasoning):
            delta["reasoning_content"] = parsed.reasoning[len(self._reasoning) :]
            self._reasoning = parsed.reasoning
        return delta

    def _rest(self, text: str) -> str:
        """What of the text is not told. It may have become shorter: a stop string may turn out to
        have begun in what was told, and around calls spaces are dropped."""
        told = self._content
        if not text.startswith(told):
            told = told.strip()
        rest = text[len(told) :] if text.startswith(told) else ""
        self._content = max(self._content, text, key=len)
        return rest


def _bare(
    index: int, answer: Answer, shape: Shape, bridge: Bridge, score: Scored | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "finish_reason": None if answer.finish is None else answer.finish.value,
        "stop_reason": answer.matched,
        "token_ids": list(answer.token_ids),
        "logprobs": logprobs_of(answer, shape, bridge, score or Scored())
        if shape.logprobs
        else None,
    }


def logprobs_of(answer: Answer, shape: Shape, bridge: Bridge, score: Scored) -> dict[str, Any]:
    """Those of the sampled tokens, and of the alternatives that were looked at."""

    def text_of(token: int) -> str:
        return f"token_id:{token}" if shape.ids_as_text else bridge.tokenizer.decode([token])

    texts = [text_of(token) for token in answer.token_ids]
    tops = [] if score.response is None else score.response.top
    tops = tops or [[] for _ in texts]
    if not shape.chat:
        named = [{text_of(token): value for token, value in top} for top in tops]
        return {
            "tokens": texts,
            "token_logprobs": list(answer.logprobs),
            "top_logprobs": named if score.response is not None else None,
            "text_offset": _offsets(texts),
        }
    return {
        "content": [
            {
                **_entry(text, logprob),
                "top_logprobs": [_entry(text_of(token), value) for token, value in top],
            }
            for text, logprob, top in zip(texts, answer.logprobs, tops, strict=True)
        ]
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _offsets(texts: list[str]) -> list[int]:
    offsets, here = [], 0
    for text in texts:
        offsets.append(here)
        here += len(text)
    return offsets


def _parsed(text: str, shape: Shape) -> ParsedModelOutput:
    parser = "any" if shape.reasoning else None
    return parse_model_output(text, tools=shape.tools, reasoning_parser=parser)


def _begun(text: str, shape: Shape) -> ParsedModelOutput:
    """What of an unfinished text is sure to be content, or thoughts."""
    parsed = ParsedModelOutput()
    if shape.reasoning:
        if _THOUGHT_END not in text:
            return parsed
        parsed = _parsed(text, replace(shape, tools=()))
        text = parsed.text
    if shape.tools:
        text = text.partition(_CALL)[0]
        held = next((n for n in range(len(_CALL), 0, -1) if text.endswith(_CALL[:n])), 0)
        text = text[: len(text) - held].rstrip()
    parsed.text = text
    return parsed


def message_of(parsed: ParsedModelOutput) -> dict[str, Any]:
    """The assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "content": parsed.text}
    if parsed.tool_calls:
        message["content"] = parsed.text or None
        message["tool_calls"] = [sent_call(call) for call in parsed.tool_calls]
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    return message


def _finish(answer: Answer, parsed: ParsedModelOutput) -> str | None:
    if parsed.tool_calls and answer.finish is FinishReason.STOP:
        return "tool_calls"
    return None if answer.finish is None else answer.finish.value
