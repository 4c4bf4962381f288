"""What a request wants generated, the same for every dialect."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dovetail.router.fields import Fields, RequestError
from dovetail.types import SamplingParams

MOST_CHOICES = 256
MOST_ANSWERS = 4096
"""Of one request: prompts times choices."""
_MOST_STOPS = 256
_SEED_END = 2**63 - 1
_EVERY_TOKEN = 2**31 - 1
"""No vocabulary has more, and engines count in machine words."""


@dataclass(frozen=True)
class Wanted:
    """How to answer one prompt."""

    sampling: SamplingParams
    """Its `max_new_tokens` counts only when `to_the_end` is false."""
    to_the_end: bool = False
    """No limit was named: as many tokens as the context has room for."""
    choices: int = 1
    keep_stop: bool = False
    """The text keeps the stop string, and the special token, that ended it."""
    routed_experts: bool = False
    """Record the experts of every token."""
    session_id: str | None = None
    """Requests of one session go to one engine where the policy is by session."""
    num_generated: int = 0
    """How much of the prompt's end is response already: draws and stop strings go on there."""

    def choice(self, number: int) -> Wanted:
        """For the choice of this number: with a seed, each has its own."""
        seed = self.sampling.seed
        if seed is None or not number:
            return self
        return replace(self, sampling=replace(self.sampling, seed=(seed + number) % _SEED_END))


def sglang_wanted(fields: Fields) -> Wanted:
    """SGLang's `sampling_params`, with SGLang's defaults.

    Raises:
        RequestError: a field is unknown, wrong, or nothing that the engine can do.
    """
    most = fields.integer("max_new_tokens", 128, 0) or 0
    # The rest of custom parameters speaks to logit processors, and there are none.
    num_generated = fields.table("custom_params").integer("num_generated", 0, 0) or 0
    sampling = SamplingParams(
        max_new_tokens=most,
        # SGLang counts from where the request begins, the engine from where the response does.
        min_new_tokens=num_generated + (fields.integer("min_new_tokens", 0, 0) or 0),
        temperature=fields.number("temperature", 1.0, 0.0),
        top_p=_top_p(fields),
        top_k=_top_k(fields, zero_is_all=False),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        stop=fields.texts("stop", _MOST_STOPS),
        stop_token_ids=fields.ids("stop_token_ids", most=_MOST_STOPS),
        ignore_eos=fields.flag("ignore_eos", False),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        seed=fields.integer("sampling_seed", None, 0, _SEED_END),
    )
    wanted = Wanted(
        sampling,
        to_the_end=fields.is_null("max_new_tokens"),
        choices=fields.integer("n", 1, 1, MOST_CHOICES) or 1,
        keep_stop=fields.flag("no_stop_trim", False),
        num_generated=num_generated,
    )
    fields.ignore("spaces_between_special_tokens", "stream_interval")
    fields.refuse("the engine has no penalties", frequency_penalty=0.0, presence_penalty=0.0)
    fields.refuse("the engine has no penalties", repetition_penalty=1.0)
    fields.refuse("the engine does not bias logits", logit_bias=None)
    fields.refuse(
        "the engine does not constrain its output",
        json_schema=None,
        regex=None,
        ebnf=None,
        structural_tag=None,
        stop_regex=None,
    )
    fields.finish()
    return wanted


def openai_wanted(fields: Fields, *, limit_names: tuple[str, ...], limit: int | None) -> Wanted:
    """The sampling fields of vLLM's and OpenAI's requests; `fields` may hold others beside them.

    Args:
        limit_names: what bounds the response; of several the first that is there counts.
        limit: the default of the bound; None: as many tokens as there is room for.

    Raises:
        RequestError: a field is wrong, or nothing that the engine can do.
    """
    asked = [fields.integer(name, None, 0) for name in limit_names]
    most = next((one for one in asked if one is not None), limit)
    sampling = SamplingParams(
        max_new_tokens=most or 0,
        min_new_tokens=fields.integer("min_tokens", 0, 0) or 0,
        temperature=fields.number("temperature", 1.0, 0.0),
        top_p=_top_p(fields),
        top_k=_top_k(fields, zero_is_all=True),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        stop=fields.texts("stop", _MOST_STOPS),
        stop_token_ids=fields.ids("stop_token_ids", most=_MOST_STOPS),
        ignore_eos=fields.flag("ignore_eos", False),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        seed=fields.integer("seed", None, 0, _SEED_END),
    )
    wanted = Wanted(
        sampling,
        to_the_end=most is None,
        choices=fields.integer("n", 1, 1, MOST_CHOICES) or 1,
        keep_stop=fields.flag("include_stop_str_in_output", False),
    )
    fields.ignore("spaces_between_special_tokens", "detokenize", "output_kind", "extra_args")
    fields.refuse("the engine has no penalties", frequency_penalty=0.0, presence_penalty=0.0)
    fields.refuse("the engine has no penalties", repetition_penalty=1.0)
    fields.refuse("the engine does not bias logits", logit_bias=None, bad_words=None)
    fields.refuse("the engine does not bias logits", allowed_token_ids=None)
    fields.refuse("the engine has no beam search", use_beam_search=False, best_of=None)
    fields.refuse(
        "the engine does not constrain its output",
        guided_json=None,
        guided_regex=None,
        guided_choice=None,
        guided_grammar=None,
        structured_outputs=None,
    )
    return wanted


def check_answers(field: str, prompts: int, choices: int) -> None:
    """Refuse a request for more than there may be.

    Raises:
        RequestError: it wants too many.
    """
    if prompts * choices > MOST_ANSWERS:
        raise RequestError(
            f"{field}: got {prompts} prompts with {choices} answers each, expected at most "
            f"{MOST_ANSWERS} answers in one request",
            field=field,
            got=f"{prompts} prompts",
            expected=f"at most {MOST_ANSWERS} answers",
        )


def _top_p(fields: Fields) -> float:
    value = fields.number("top_p", 1.0, 0.0, 1.0)
    if value == 0.0:
        raise fields.wrong("top_p", value, "a number above 0 and up to 1")
    return value


def _top_k(fields: Fields, *, zero_is_all: bool) -> int:
    value = fields.integer("top_k", -1, -1)
    assert value is not None
    if value == 0 and not zero_is_all:
        raise fields.wrong("top_k", value, "a whole number >= 1, or -1 for all")
    return min(value, _EVERY_TOKEN) or -1
