"""What SGLang's /generate says about tokens beside the sampled ones: how probable those of the
prompt are, and which were the most probable at each place.

As SGLang has it: the prompt's logprobs are those of the logits as they are, whatever the
temperature; the alternatives of a response are under its temperature. The first entry about a
prompt has no logprob, wherever `logprob_start_len` begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.router.answer import Answer
from dovetail.router.bridge import Bridge
from dovetail.router.fields import Fields, Shape, wrong
from dovetail.router.wanted import Wanted
from dovetail.types import ScoreResult

MOST_ALTERNATIVES = 256
_NO_SCORES = "this engine tells the sampled tokens' logprobs only"
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Wish:
    """What the answer to one prompt says of logprobs."""

    logprobs: bool
    start: int
    """First token of the prompt that the answer tells of; the prompt's length: none."""
    top: int
    """Alternatives per token."""


def wishes_of(
    fields: Fields, prompts: Sequence[Sequence[int]], *, can_score: bool, stream: bool
) -> list[Wish]:
    """One per prompt; each field may be a list of them.

    Raises:
        RequestError: a field is wrong, or the engine can't score and is asked to.
    """
    columns = [
        _column(fields, name, default, len(prompts))
        for name, default in (
            ("return_logprob", False),
            ("logprob_start_len", -1),
            ("top_logprobs_num", 0),
        )
    ]
    wishes = []
    for prompt, logprobs, start, top in zip(prompts, *columns, strict=True):
        if not isinstance(logprobs, bool):
            raise wrong("return_logprob", logprobs, "true or false")
        if not _is_count(start, -1, len(prompt)):
            raise wrong("logprob_start_len", start, f"-1, or a token of the prompt's {len(prompt)}")
        if not _is_count(top, 0, MOST_ALTERNATIVES):
            raise wrong("top_logprobs_num", top, f"a whole number from 0 to {MOST_ALTERNATIVES}")
        if top and stream and logprobs:
            raise wrong("top_logprobs_num", top, "0 or nothing: a stream has no alternatives")
        whole = logprobs and start >= 0
        wish = Wish(logprobs, start if whole else len(prompt), top if logprobs else 0)
        if wish.start + 1 < len(prompt) and not can_score:
            raise wrong("logprob_start_len", start, f"-1 or nothing: {_NO_SCORES}")
        if wish.top and not can_score:
            raise wrong("top_logprobs_num", top, f"0 or nothing: {_NO_SCORES}")
        wishes.append(wish)
    return wishes


def _column(fields: Fields, name: str, default: Any, count: int) -> list[Any]:
    one = {"type": "boolean" if isinstance(default, bool) else "integer"}
    schema = {"anyOf": [one, {"type": "array", "items": one}, {"type": "null"}]}
    given = fields.raw(name, default, shape=Shape(schema, sample=default))
    if not isinstance(given, list):
        return [given] * count
    if len(given) != count:
        raise wrong(name, given, f"one for each of the {count} prompts")
    return [default if value is None else value for value in given]


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


async def prompt_scores(bridge: Bridge, prompt: Sequence[int], wish: Wish) -> ScoreResult | None:
    """Of the tokens behind the first that the answer tells of.

    Raises:
        RequestError: the prompt can never fit.
    """
    if wish.start + 1 >= len(prompt):
        return None
    return await bridge.score(prompt, wish.start + 1, top=wish.top)


async def response_scores(
    bridge: Bridge, prompt: Sequence[int], wanted: Wanted, answer: Answer, wish: Wish
) -> ScoreResult | None:
    """Of the response's tokens, for their alternatives."""
    if not wish.top or not answer.token_ids:
        return None
    # At temperature 0 the engine tells logprobs of the logits as they are.
    temperature = wanted.sampling.temperature or 1.0
    whole = (*prompt, *answer.token_ids)
    return await bridge.score(whole, len(prompt), temperature=temperature, top=wish.top)


def prompt_entries(
    prompt: Sequence[int], wish: Wish, scores: ScoreResult | None, decode: Decode | None
) -> dict[str, Any]:
    """`input_token_logprobs` and, where wanted, `input_top_logprobs`."""
    told = list(prompt[wish.start :])
    values = [None, *(scores.logprobs if scores is not None else [])][: len(told)]
    entries: dict[str, Any] = {
        "input_token_logprobs": [
            _entry(value, token, decode) for value, token in zip(values, told, strict=True)
        ]
    }
    if wish.top:
        tops = [None, *_tops(scores, decode)]
        entries["input_top_logprobs"] = tops[: len(told)]
    return entries


def response_entries(
    answer: Answer, wish: Wish, scores: ScoreResult | None, decode: Decode | None
) -> dict[str, Any]:
    """`output_token_logprobs` and, where wanted, `output_top_logprobs`."""
    entries: dict[str, Any] = {
        "output_token_logprobs": [
            _entry(value, token, decode)
            for value, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ]
    }
    if wish.top:
        entries["output_top_logprobs"] = _tops(scores, decode)
    return entries


def _tops(scores: ScoreResult | None, decode: Decode | None) -> list[list[list[Any]]]:
    if scores is None:
        return []
    return [[_entry(value, token, decode) for token, value in place] for place in scores.top]


def _entry(value: float | None, token: int, decode: Decode | None) -> list[Any]:
    return [value, token, None if decode is None else decode([token])]
