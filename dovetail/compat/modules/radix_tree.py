"""`router.middleware_hub.radix_tree_middleware`: middleware that keeps what texts are made of, and
how a generate function reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from dovetail.compat.modules.http import post
from dovetail.compat.modules.mask import get_response_lengths
from dovetail.compat.modules.wire import server_of
from dovetail.router.text_cache import TextCache as StringRadixTrie
from dovetail.router.text_middleware import RadixTreeMiddleware
from dovetail.types import HookRunError, Sample

__all__ = ["RadixTreeMiddleware", "StringRadixTrie", "postprocess_sample_with_radix_tree"]


async def postprocess_sample_with_radix_tree(
    args: Any, sample: Sample, output: Mapping[str, Any] | str
) -> Sample:
    """Append an answer to `sample`: its text from `output`, its tokens, loss mask and logprobs as
    the middleware kept them.

    Args:
        output: what /generate answered, or its text. With logprobs in it, those are taken where
            another request made the same text of other tokens.

    Raises:
        HookRunError: the server does not know the answer, or `args.partial_rollout` is set, whose
            masks this would take away.
    """
    _check(args, sample)
    text = output if isinstance(output, str) else output["text"]
    meta = {} if isinstance(output, str) else output.get("meta_info") or {}
    pairs = meta.get("output_token_logprobs") or []
    before = f"{sample.prompt}{sample.response}"
    tokens, mask, logprobs = await _retrieve(args, before + text)
    ids = [token for _, token, *_ in pairs]
    if ids and (tokens[-len(ids) :] != ids or 0 in mask[-len(ids) :]):
        tokens, mask, logprobs = await _retrieve(args, before)
        tokens, mask = tokens + ids, mask + [1] * len(ids)
        logprobs = logprobs + [value for value, *_ in pairs]
    (length,) = get_response_lengths([mask])
    if text and not length:
        raise HookRunError(
            f"the server at {server_of(args)[0]} knows no answer in {before[-40:] + text!r:.200}: "
            "expected the sample's prompt, its response, and an answer that the server gave to "
            "them. Ask /generate with exactly this text or its ids"
        )
    start = len(tokens) - length
    sample.tokens, sample.response_length = tokens, length
    sample.response += text
    sample.loss_mask, sample.rollout_log_probs = mask[start:], logprobs[start:]
    return sample


def _check(args: Any, sample: Sample) -> None:
    if getattr(args, "partial_rollout", False):
        raise HookRunError(
            "postprocess_sample_with_radix_tree: args.partial_rollout is set, which the cache of "
            "texts does not go with: leave --partial-rollout out (TOML: rollout.partial_rollout)"
        )
    if not isinstance(sample.prompt, str):
        raise HookRunError(
            f"postprocess_sample_with_radix_tree: sample.prompt is a {type(sample.prompt).__name__}"
            ", expected a text: --apply-chat-template makes one of messages (TOML: "
            "data.apply_chat_template)"
        )


async def _retrieve(args: Any, text: str) -> tuple[list[int], list[int], list[float]]:
    asked = {"text": text, "return_logp": True}
    root = server_of(args)[0]
    try:
        found = await post(f"{root}/retrieve_from_text", asked)
    except aiohttp.ClientResponseError as error:
        if error.status != 404:
            raise
        raise HookRunError(
            f"the server at {root} has no /retrieve_from_text: put RadixTreeMiddleware before it, "
            "--router-middleware-paths slime.router.middleware_hub.radix_tree_middleware."
            "RadixTreeMiddleware (TOML: hooks.router_middleware_paths)"
        ) from error
    return found["tokens"], found["loss_mask"], found["rollout_logp"]
