"""What OpenAI's and vLLM's answers say about tokens beside the sampled ones: how probable those of
the prompt are, and which were the most probable at each place."""

from __future__ import annotations

from typing import Any

from dovetail.router.answer import Answer
from dovetail.router.bridge import Bridge
from dovetail.router.dialects.openai_shape import Job, Scored, Shape
from dovetail.router.fields import Fields
from dovetail.router.fields import Shape as FieldShape
from dovetail.types import ScoreResult

MOST_ALTERNATIVES = 64
_NO_SCORES = "this engine tells the sampled tokens' logprobs only"
_NUMBER = {"type": "integer", "minimum": 0, "maximum": MOST_ALTERNATIVES}
_COUNT = FieldShape({"anyOf": [_NUMBER, {"type": ["boolean", "null"]}]})


def most_alternatives(fields: Fields, name: str, bridge: Bridge) -> int | None:
    """How many of the most probable tokens are wanted at each place; None: no logprobs at all.

    Raises:
        RequestError: it is no number of them, or the engine can't tell.
    """
    value = fields.raw(name, shape=_COUNT)
    if value is None or value is False:
        return None
    count = int(value) if isinstance(value, bool) else value
    if not isinstance(count, int) or not 0 <= count <= MOST_ALTERNATIVES:
        raise fields.wrong(name, value, f"a whole number from 0 to {MOST_ALTERNATIVES}")
    if count > 1 and not bridge.can_score:
        raise fields.wrong(name, value, f"0 or 1: {_NO_SCORES}")
    return count


def prompt_logprobs_wanted(fields: Fields, bridge: Bridge) -> int | None:
    """vLLM's `prompt_logprobs`: how many alternatives at each of the prompt's tokens.

    Raises:
        RequestError: it is no number of them, or the engine can't tell.
    """
    count = fields.integer("prompt_logprobs", None, 0, MOST_ALTERNATIVES)
    if count is not None and not bridge.can_score:
        raise fields.wrong("prompt_logprobs", count, f"nothing: {_NO_SCORES}")
    return count


def no_alternatives(fields: Fields, top: int, prompt_top: int | None) -> None:
    """A stream has none.

    Raises:
        RequestError: it should.
    """
    if top:
        raise fields.wrong("logprobs", top, "0 or 1: a stream has no alternatives")
    if prompt_top is not None:
        raise fields.wrong("prompt_logprobs", prompt_top, "nothing: a stream does not have them")


async def scored(bridge: Bridge, job: Job, answer: Answer, shape: Shape) -> Scored:
    """What the answer has to tell beyond what was sampled.

    Raises:
        RequestError: the engine failed.
    """
    prompt = response = None
    if shape.prompt_top is not None and len(job.prompt) > 1:
        prompt = await bridge.score(job.prompt, 1, top=shape.prompt_top)
    if shape.top and answer.token_ids and bridge.can_score:
        whole = (*job.prompt, *answer.token_ids)
        # At temperature 0 the engine tells logprobs of the logits as they are.
        temperature = job.wanted.sampling.temperature or 1.0
        response = await bridge.score(
            whole, len(job.prompt), temperature=temperature, top=shape.top
        )
    return Scored(prompt, response)


def prompt_entries(job: Job, score: ScoreResult | None, bridge: Bridge) -> list[Any]:
    """vLLM's form: nothing for the first token, then an object by token id at each place, with the
    prompt's own token first. Its rank is null where it is not among the most probable."""
    entries: list[Any] = [None]
    if score is None:
        return entries
    for token, logprob, top in zip(job.prompt[1:], score.logprobs, score.top, strict=True):
        ranks = {one: place for place, (one, _) in enumerate(top, 1)}
        told = {token: (logprob, ranks.get(token))}
        told |= {one: (value, ranks[one]) for one, value in top if one != token}
        entries.append(
            {
                str(one): {
                    "logprob": value,
                    "rank": rank,
                    "decoded_token": bridge.tokenizer.decode([one]),
                }
                for one, (value, rank) in told.items()
            }
        )
    return entries
