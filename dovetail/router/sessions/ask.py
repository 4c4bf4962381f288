"""What a client of a session asks for: read leniently, as programs that know nothing of training
send what they like, and sampled as the run does, whose logprobs are trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from dovetail.router.dialects.openai import MESSAGES
from dovetail.router.fields import Fields, RequestError, Shape, is_ids, is_objects, wrong
from dovetail.router.messages import as_said
from dovetail.router.sessions.tree import Message, Session
from dovetail.router.tool_calls import read_tools
from dovetail.router.wanted import Wanted, openai_wanted, sglang_wanted
from dovetail.types import SamplingParams

log = logging.getLogger(__name__)

_LIMITS = ("max_completion_tokens", "max_tokens")
_MESSAGES = "a list of messages {'role': ..., 'content': ...}"
_PROMPT = Shape(
    {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]},
    sample="hi",
    required=True,
)
_OBJECT = Shape({"type": ["object", "null"]})
_ID = Shape({"type": ["string", "null"], "pattern": "^[^/]+$", "maxLength": 256})
_MOST_ID = 256
_BESIDE = Shape({"description": "As in sampling_params, which counts where both are there."})
_FLAT = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop", "sampling_seed")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": None,
    "response_format": {"type": "text"},
}


@dataclass(frozen=True)
class Opening:
    """A request for a session."""

    session_id: str | None
    sampling: SamplingParams | None
    """None: as its clients ask."""
    max_context_len: int | None
    evaluation: bool


@dataclass(frozen=True)
class Asked:
    """A request, read."""

    body: Mapping[str, Any]
    """All of it."""
    model: str
    limit: int | None
    """Most tokens of the answer; None: not said."""
    stop: tuple[str, ...] = ()
    messages: Sequence[Message] = ()
    prompt: str | Sequence[int] = ""
    """Of a plain completion."""
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """For the chat template."""
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    token_ids: bool = False


def opening(fields: Fields) -> Opening:
    """A request for a session.

    Raises:
        RequestError: a field is malformed, or asks for what the engine can't do.
    """
    # A slash would make a path that leads elsewhere.
    name = fields.raw("session_id", shape=_ID)
    if name is not None and (
        not isinstance(name, str) or not 0 < len(name) <= _MOST_ID or "/" in name
    ):
        raise fields.wrong("session_id", name, f"1 to {_MOST_ID} characters without a slash")
    return Opening(
        name,
        _sampling(fields),
        max_context_len=fields.integer("max_context_len", None, 1),
        evaluation=fields.flag("evaluation", False),
    )


def _sampling(fields: Fields) -> SamplingParams | None:
    """What the session samples with, in SGLang's names, beside the others or in an object."""
    flat = {name: fields.raw(name, shape=_BESIDE) for name in _FLAT}
    given = {name: value for name, value in flat.items() if value is not None}
    inside = sglang_wanted(fields.table("sampling_params")).sampling
    if "sampling_params" in fields:
        return inside
    return sglang_wanted(Fields(given)).sampling if given else None


def samples_asked(fields: Fields) -> tuple[dict[str, Any], int | None]:
    """What the agent tells of its session, and the most tokens of a sample.

    Raises:
        RequestError: a field is malformed.
    """
    told = fields.raw("metadata", {}, shape=_OBJECT)
    if not isinstance(told, dict):
        raise fields.wrong("metadata", told, "an object")
    _check_depth("metadata", told)
    return told, fields.integer("max_seq_len", None, 1)


def chat_asked(fields: Fields, model: str) -> Asked:
    """A request for a chat completion.

    Raises:
        RequestError: a field is malformed, or asks for several answers.
    """
    given = fields.raw("messages", shape=MESSAGES)
    if not isinstance(given, list) or not given:
        raise wrong("messages", given, _MESSAGES)
    _check_depth("messages", given)
    tools = read_tools(fields)
    choice = fields.raw("tool_choice", "auto")
    if choice not in ("auto", "none"):
        _tell("tool_choice", choice, "no tool can be forced")
    options = fields.raw("chat_template_kwargs", {}, shape=_OBJECT)
    if not isinstance(options, dict):
        raise wrong("chat_template_kwargs", options, "an object")
    return dataclasses.replace(
        _asked(fields, model),
        messages=[_message(number, one) for number, one in enumerate(given)],
        tools=None if choice == "none" else tools,
        options=options,
        logprobs=bool(fields.raw("logprobs", False)),
    )


def text_asked(fields: Fields, model: str) -> Asked:
    """A request for a plain completion.

    Raises:
        RequestError: a field is malformed, or asks for several answers.
    """
    given = fields.raw("prompt", shape=_PROMPT)
    one = given[0] if isinstance(given, list) and len(given) == 1 and not is_ids(given) else given
    if not one or not (isinstance(one, str) or is_ids(one)):
        raise wrong("prompt", given, "text, or a list of token ids: one prompt")
    logprobs = fields.raw("logprobs") not in (None, False)
    return dataclasses.replace(_asked(fields, model), prompt=one, logprobs=logprobs)


def wanted_of(asked: Asked, session: Session, number: int, *, by_run: bool) -> Wanted:
    """How to sample the answer to request `number` of the session.

    Args:
        by_run: the run's sampling counts; of the client's only the limit and stop strings, which
            can only shorten the answer.

    Raises:
        RequestError: a field is wrong, or nothing that the engine can do.
    """
    own = session.sampling
    if own is None or not by_run:
        wanted = _by_client(asked, own)
        seed = wanted.sampling.seed
    else:
        _tell_of_unused(asked.body, own)
        limits = [one for one in (asked.limit, own.max_new_tokens) if one is not None]
        stop = tuple(dict.fromkeys((*own.stop, *asked.stop)))
        sampling = dataclasses.replace(own, max_new_tokens=min(limits), stop=stop)
        wanted, seed = Wanted(sampling), own.seed
    if own is not None and seed == own.seed and seed is not None:
        # Equal seeds draw alike at equal places: every request needs its own.
        seed = _seed_of(seed, number)
    # Special tokens may be what delimits calls and thoughts.
    sampling = dataclasses.replace(wanted.sampling, seed=seed, skip_special_tokens=False)
    return dataclasses.replace(wanted, sampling=sampling, keep_stop=False)


def describe_sampling(fields: Fields) -> None:
    """What counts of a client's sampling, where it samples as it asks."""
    openai_wanted(fields, limit_names=_LIMITS, limit=None)


def _by_client(asked: Asked, own: SamplingParams | None) -> Wanted:
    named: dict[str, Any] = {}
    if own is not None:
        named = {
            "temperature": own.temperature,
            "top_p": own.top_p,
            "top_k": own.top_k,
            "min_p": own.min_p,
            "min_tokens": own.min_new_tokens,
            "stop": list(own.stop),
            "stop_token_ids": list(own.stop_token_ids),
            "seed": own.seed,
        }
    said = {name: value for name, value in asked.body.items() if value is not None}
    limit = None if own is None else own.max_new_tokens
    return openai_wanted(Fields({**named, **said}), limit_names=_LIMITS, limit=limit)


def _asked(fields: Fields, model: str) -> Asked:
    choices = fields.integer("n", 1)
    if choices != 1:
        raise fields.wrong("n", choices, "1: a session records one answer to each request")
    limits = [fields.integer(name, None, 0) for name in _LIMITS]
    return Asked(
        body=fields.values,
        model=fields.text("model", model) or model,
        limit=next((one for one in limits if one is not None), None),
        stop=fields.texts("stop"),
        stream=fields.flag("stream", False),
        usage=fields.table("stream_options").flag("include_usage", False),
        token_ids=fields.flag("return_token_ids", False),
    )


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(f"messages[{number}]", message, "{'role': ..., 'content': ...}")
    calls = message.get("tool_calls")
    if calls is not None and not is_objects(calls):
        raise wrong(f"messages[{number}].tool_calls", calls, "a list of objects")
    try:
        return as_said(message)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"messages[{number}].content: {error}", field=f"messages[{number}].content"
        ) from error


def _check_depth(name: str, given: Any) -> None:
    """What is recorded is sent back later on."""
    try:
        orjson.dumps(given)
    except TypeError as error:
        raise wrong(name, given, "fewer lists and objects inside each other") from error


def _seed_of(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}.{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _tell_of_unused(body: Mapping[str, Any], own: SamplingParams) -> None:
    used = {**_NEUTRAL, **{name: getattr(own, name) for name in _SAMPLING}}
    for name, value in used.items():
        got = body.get(name)
        if got not in (None, [], {}) and got != value:
            _tell(name, got, "the run samples as it is set (--session-sampling client: as asked)")


_told: set[str] = set()


def _tell(name: str, value: Any, reason: str) -> None:
    """Once for each field: agents send the same ones with every request."""
    if name not in _told:
        _told.add(name)
        log.warning("sessions: %s %.80r has no effect: %s", name, value, reason)
