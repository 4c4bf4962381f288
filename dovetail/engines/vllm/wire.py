"""Requests and answers of vLLM's `/inference/v1/generate`: token ids in, token ids out."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dovetail.engines.seam import stop_over_the_seam
from dovetail.types.calls import (
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    ScoreRequest,
    ScoreResult,
    VersionSpan,
)
from dovetail.types.errors import EngineError, EngineGoneError
from dovetail.types.ports import Tokenizer

_NOT_A_NUMBER = -9999.0
"""What vLLM sends for a logprob of minus infinity or NaN."""
_UNSET = "default"
"""The version of a server that was told none."""
_SEED_BITS = 63
_GOLDEN = 0x9E3779B97F4A7C15
_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "repetition": FinishReason.STOP,
}


class MalformedAnswerError(EngineGoneError):
    """What came back is no answer of vLLM: another engine may answer."""


def generate_body(
    request: GenerateRequest, wire_id: str, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The request as vLLM takes it."""
    return {
        "request_id": wire_id,
        "token_ids": request.prompt_ids,
        "sampling_params": _sampling(request.sampling, request.num_generated, eos_token_ids),
    }


def _sampling(
    sampling: SamplingParams, num_generated: int, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    stops = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops.update(eos_token_ids)
    least = sampling.min_new_tokens - num_generated
    params: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": max(0, min(least, sampling.max_new_tokens)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop_token_ids": sorted(stops),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": 0,
        # Text is made here, where it is wanted; vLLM needs it only to find stop strings.
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
    }
    if sampling.stop:
        params["stop"] = sampling.stop
        params["include_stop_str_in_output"] = True
    if sampling.seed is not None:
        params["seed"] = wire_seed(sampling.seed, num_generated)
    return params


def wire_seed(seed: int, num_generated: int) -> int:
    """The seed of a call that goes on after `num_generated` tokens.

    vLLM draws from one generator per request, from its beginning: with the same seed, a continued
    response would repeat the draws of its first tokens.
    """
    if num_generated:
        # The finaliser of splitmix64: neighbours of either number give unrelated seeds.
        seed = (seed + num_generated * _GOLDEN) & (2**64 - 1)
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        seed ^= seed >> 31
    return seed & (2**_SEED_BITS - 1)


def generate_result(
    request: GenerateRequest, answer: Any, tokenizer: Tokenizer | None
) -> GenerateResult:
    """vLLM's answer as a result.

    A stop string that begins in what the request brought along is cut here: vLLM looks at new text
    only, and went on.

    Raises:
        MalformedAnswerError: a field is missing or is not what it should be.
        EngineError: logprobs are not finite, weights have a version that is no number, or the
            experts that were asked for are missing.
    """
    try:
        choice = answer["choices"][0]
        ids = [int(token) for token in choice["token_ids"]]
        logprobs = [float(one["logprob"]) for one in (choice["logprobs"] or {})["content"] or ()]
        reason = _reason(choice["finish_reason"])
        spans = _spans(choice.get("weight_versions") or (), len(ids))
        experts = _experts(request, choice.get("routed_experts"), len(ids))
        details = answer["usage"].get("prompt_tokens_details") or {}
        cached = int(details.get("cached_tokens") or 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswerError(
            f"request {request.request_id!r}: the answer is not vLLM's: {_said(error)}"
        ) from error
    _check_numbers(request, ids, logprobs, spans)
    end = stop_over_the_seam(request, ids, tokenizer)
    if end is not None and end < len(ids):
        ids, logprobs, reason = ids[:end], logprobs[:end], FinishReason.STOP
        spans = tuple(s if s.end <= end else _until(s, end) for s in spans if s.start < end)
        experts = None if experts is None else experts[: len(request.prompt_ids) + end - 1]
    text = ""
    if ids and tokenizer is not None:
        text = tokenizer.decode(ids, skip_special_tokens=request.sampling.skip_special_tokens)
    return GenerateResult(
        request_id=request.request_id,
        token_ids=ids,
        logprobs=logprobs,
        finish_reason=reason,
        text=text,
        version_spans=spans,
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=cached,
        routed_experts=experts,
    )


def version_number(version: str) -> int:
    """A version as vLLM carries it; of a server that was told none it is that of its files, 0.

    Raises:
        EngineGoneError: it is no number; weights of such an engine are not ours.
    """
    if version == _UNSET:
        return 0
    if not version.isdecimal():
        raise EngineGoneError(
            f"the engine's weights have the version {version!r}; expected a number"
        )
    return int(version)


def score_body(request: ScoreRequest, wire_id: str) -> dict[str, Any]:
    """A request that generates one token, which vLLM can't do without, and scores the others."""
    rescaled = request.temperature != 1.0
    return {
        "request_id": wire_id,
        "token_ids": request.token_ids,
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            # vLLM's are of temperature 1; from all of them those of another one follow.
            "prompt_logprobs": -1 if rescaled else request.top,
        },
    }


def score_result(request: ScoreRequest, answer: Any) -> ScoreResult:
    """The logprobs of the tokens from `start` on.

    Raises:
        MalformedAnswerError: a field is missing or is not what it should be.
        EngineError: the figures are not finite.
    """
    try:
        places = answer["prompt_logprobs"][request.start :]
        versions = answer["choices"][0].get("weight_versions") or ()
        version = version_number(str(versions[0]["version"])) if versions else 0
        found = [_place(place, request) for place in places]
        logprobs = [
            place[token]
            for place, token in zip(found, request.token_ids[request.start :], strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswerError(
            f"request {request.request_id!r}: the answer is not vLLM's: {_said(error)}"
        ) from error
    if any(not math.isfinite(one) or one <= _NOT_A_NUMBER for one in logprobs):
        raise EngineError(f"request {request.request_id!r}: the model's figures are not finite")
    most = [sorted(place.items(), key=lambda one: -one[1])[: request.top] for place in found]
    return ScoreResult(logprobs, most if request.top else [[] for _ in found], version)


def _place(place: Mapping[str, Any], request: ScoreRequest) -> dict[int, float]:
    """Logprobs by token id."""
    found = {int(token): float(one["logprob"]) for token, one in place.items()}
    if request.temperature == 1.0:
        return found
    scaled = np.array(list(found.values())) / request.temperature
    scaled -= scaled.max()
    scaled -= np.log(np.exp(scaled).sum())
    return dict(zip(found, scaled.tolist(), strict=True))


def _reason(said: str | None) -> FinishReason:
    if said not in _REASONS:
        raise ValueError(f"finish_reason {said!r}")
    return _REASONS[said]


def _spans(versions: Sequence[Mapping[str, Any]], num_tokens: int) -> tuple[VersionSpan, ...]:
    spans = tuple(
        VersionSpan(version_number(str(one["version"])), int(one["start"]), int(one["end"]))
        for one in versions
        if int(one["end"]) > int(one["start"])
    )
    edges = [0, *(edge for span in spans for edge in (span.start, span.end)), num_tokens]
    if any(edges[i] != edges[i + 1] for i in range(0, len(edges), 2)):
        raise ValueError(f"weight_versions {list(versions)} of {num_tokens} tokens")
    return spans


def _until(span: VersionSpan, end: int) -> VersionSpan:
    return VersionSpan(span.weight_version, span.start, end)


def _experts(request: GenerateRequest, encoded: str | None, num_new: int) -> Any:
    """[prompt + response - 1, MoE layers, top_k] int32."""
    if not request.return_routed_experts:
        return None
    if encoded is None:
        if not num_new:  # Aborted before the first step.
            return None
        raise EngineError(
            f"request {request.request_id!r}: vLLM recorded no experts; it does with "
            "--enable-return-routed-experts, and only of a mixture-of-experts model"
        )
    try:
        raw = base64.b64decode(encoded, validate=True)
        experts = np.load(io.BytesIO(raw), allow_pickle=False).astype(np.int32)
    except (binascii.Error, OSError, EOFError) as error:
        raise ValueError(f"routed_experts: {error}") from error
    expected = len(request.prompt_ids) + num_new - 1
    if experts.ndim != 3 or (num_new and len(experts) != expected):
        raise ValueError(f"routed_experts {experts.shape} of {expected} tokens")
    return experts


def _check_numbers(
    request: GenerateRequest,
    ids: Sequence[int],
    logprobs: Sequence[float],
    spans: Sequence[VersionSpan],
) -> None:
    if len(ids) != len(logprobs):
        raise MalformedAnswerError(
            f"request {request.request_id!r}: {len(ids)} tokens with {len(logprobs)} logprobs"
        )
    if any(not math.isfinite(one) or one <= _NOT_A_NUMBER for one in logprobs):
        raise EngineError(
            f"request {request.request_id!r}: the model's figures are not finite; weights of "
            f"version {spans[-1].weight_version if spans else 0} are damaged"
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
