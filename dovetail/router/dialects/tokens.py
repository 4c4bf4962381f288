"""POST /tokenize and /detokenize, in vLLM's and SGLang's forms at once."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.bridge import Bridge
from dovetail.router.describe import described
from dovetail.router.dialects.openai import chat_prompt
from dovetail.router.fields import Fields, RequestError, Shape, is_ids, wrong
from dovetail.router.respond import Json, read

_PROMPT = Shape({"type": ["string", "array", "null"], "items": {"type": "string"}})
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TOKENS = Shape({"anyOf": [_IDS, {"type": "array", "items": _IDS}, {"type": "null"}]})


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of text to tokens and back."""

    @described("Tokens of a text, or of a conversation", _read_any)
    async def tokenize(request: Request) -> Response:
        return Json(await read(request, lambda fields: _tokenized(fields, bridge)))

    @described("The text of tokens", _detokenized)
    async def detokenize(request: Request) -> Response:
        return Json(await read(request, lambda fields: _detokenized(fields, bridge)))

    return [
        *(Route(path, tokenize, methods=["POST"]) for path in ("/tokenize", "/v1/tokenize")),
        *(Route(path, detokenize, methods=["POST"]) for path in ("/detokenize", "/v1/detokenize")),
    ]


def _read_any(fields: Fields, bridge: Bridge) -> None:
    """Both forms; neither needs the other's fields."""
    _tokenized(fields, bridge)
    chat_prompt(fields, bridge, required=False)


def _tokenized(fields: Fields, bridge: Bridge) -> dict[str, Any]:
    """What vLLM answers; SGLang's prompt may be a list, whose answers are lists."""
    fields.ignore("model")
    with_strings = fields.flag("return_token_strs", False)
    if "messages" in fields:
        ids, tokens = list(chat_prompt(fields, bridge, required=False)[0]), None
        fields.flag("add_special_tokens", False)
    else:
        prompt = fields.raw("prompt", "", shape=_PROMPT)
        special = fields.flag("add_special_tokens", True)
        texts = prompt if isinstance(prompt, list) else [prompt]
        if not all(isinstance(text, str) for text in texts):
            raise wrong("prompt", prompt, "text or a list of texts")
        many = [bridge.tokenizer.encode(text, add_special_tokens=special) for text in texts]
        ids, tokens = (many[0], None) if not isinstance(prompt, list) else ([], many)
    fields.finish()
    answer: dict[str, Any] = {
        "count": len(ids) if tokens is None else [len(one) for one in tokens],
        "tokens": ids if tokens is None else tokens,
        "max_model_len": bridge.max_context_len,
        "token_strs": None,
    }
    if with_strings and tokens is None:
        answer["token_strs"] = [bridge.tokenizer.decode([one]) for one in ids]
    return answer


def _detokenized(fields: Fields, bridge: Bridge) -> dict[str, Any]:
    fields.ignore("model")
    tokens = fields.raw("tokens", [], shape=_TOKENS)
    skip = fields.flag("skip_special_tokens", False)
    fields.finish()
    several = isinstance(tokens, list) and bool(tokens) and isinstance(tokens[0], list)
    many = tokens if several else [tokens]
    if not all(is_ids(one) for one in many):
        raise wrong("tokens", tokens, "a list of token ids, or a list of such lists")
    for one in many:
        _check_known(one, bridge)
    texts = [bridge.tokenizer.decode(one, skip_special_tokens=skip) for one in many]
    text = texts if several else texts[0]
    return {"prompt": text, "text": text}


def _check_known(ids: list[int], bridge: Bridge) -> None:
    end = bridge.vocab_size
    if end is not None and ids and max(ids) >= end:
        raise RequestError(
            f"token id {max(ids)} is none of this model's, which end at {end - 1}",
            field="tokens",
            got=str(max(ids)),
            expected=f"ids from 0 to {end - 1}",
        )
