"""Requests and answers of SGLang's `/generate`: token ids in, token ids and logprobs out.

Field names and meanings are those of sglang 0.5.23 (sglang/srt/managers/io_struct.py,
sglang/api/v1/api_types.py, sglang/srt/utils/weight_versions.py).
"""

from __future__ import annotations

import base64
import binascii
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
from dovetail.types.errors import EngineError, EngineGoneError, RequestRefusedError
from dovetail.types.ports import Tokenizer

UNSET = "default"
"""The version of a server that was told none."""
NUM_GENERATED = "num_generated"
"""In `custom_params`: how much of the prompt is response already. SGLang hands it to users' logit
processors only; `dovetail serve` goes on with draws and stop strings where the response stood."""
_SEED_MASK = 2**63 - 1
_MOST_TOP_K = 1 << 30
_MOST_STOPS = 32
"""SGLang refuses more stop strings."""

ExpertShape = tuple[int, tuple[int, ...], int]
"""Layers that SGLang tells of, which of them have experts, and how many experts a token goes to."""


class MalformedAnswerError(EngineGoneError):
    """What came back is no answer of SGLang: another engine may answer."""


def generate_body(
    request: GenerateRequest, wire_id: str, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The request as SGLang takes it.

    Raises:
        RequestRefusedError: SGLang has no words for it.
    """
    if len(request.sampling.stop) > _MOST_STOPS:
        raise RequestRefusedError(
            f"request {request.request_id!r}: {len(request.sampling.stop)} stop strings; SGLang "
            f"takes {_MOST_STOPS} (--rollout-stop, TOML: rollout.rollout_stop)"
        )
    body: dict[str, Any] = {
        "rid": wire_id,
        "input_ids": request.prompt_ids,
        "sampling_params": _sampling(request.sampling, request.num_generated, eos_token_ids),
        "return_logprob": True,
    }
    if request.return_routed_experts:
        body["return_routed_experts"] = True
    return body


def _sampling(
    sampling: SamplingParams, num_generated: int, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    stops = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops.update(eos_token_ids)
    least = min(sampling.min_new_tokens - num_generated, sampling.max_new_tokens)
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": max(0, least),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if 0 < sampling.top_k < _MOST_TOP_K else -1,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": sorted(stops) or None,
        "ignore_eos": sampling.ignore_eos,
        "skip_special_tokens": sampling.skip_special_tokens,
        "spaces_between_special_tokens": False,
        # The token that ended the response belongs to it.
        "no_stop_trim": True,
        # A server may have others of its own out of the model's generation_config.json.
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed & _SEED_MASK
    if num_generated:
        params["custom_params"] = {NUM_GENERATED: num_generated}
    return params


def answered_id(answer: Any) -> str | None:
    """The wire id of the request that this answers; None: it does not say."""
    meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
    found = meta.get("id") if isinstance(meta, Mapping) else None
    return found if isinstance(found, str) else None


def generate_result(
    request: GenerateRequest,
    answer: Any,
    tokenizer: Tokenizer | None,
    experts: ExpertShape | None = None,
) -> GenerateResult:
    """SGLang's answer as a result.

    A stop string that begins in what the request brought along is cut here: SGLang looks at new
    text only, and went on.

    Args:
        experts: how many there are, where the answer does not say so itself.

    Raises:
        MalformedAnswerError: a field is missing or is not what it should be.
        RequestRefusedError: the experts that were asked for are missing.
        EngineError: logprobs are not finite.
    """
    try:
        meta = answer["meta_info"]
        entries = meta.get("output_token_logprobs") or ()
        ids = [_whole(token) for _, token, *_ in entries]
        values = [value for value, *_ in entries]
        finish = meta["finish_reason"]
        reason = FinishReason(finish["type"])
        spans = _spans(meta, len(ids))
        routed = _routed(request, meta, len(ids), experts)
        cached, text = _whole(meta.get("cached_tokens") or 0), str(answer["text"])
    except RequestRefusedError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswerError(
            f"request {request.request_id!r}: the answer is not SGLang's: {_said(error)}"
        ) from error
    _check_count(request, ids, meta)
    logprobs = _finite(request.request_id, values, spans)
    end = stop_over_the_seam(request, ids, tokenizer)
    if end is not None and end < len(ids):
        ids, logprobs, reason = ids[:end], logprobs[:end], FinishReason.STOP
        spans = tuple(_until(span, end) for span in spans if span.start < end)
        routed = None if routed is None else routed[: len(request.prompt_ids) + end - 1]
        assert tokenizer is not None
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
        routed_experts=routed,
    )


def score_body(request: ScoreRequest, wire_id: str) -> dict[str, Any]:
    """SGLang's way to ask about tokens that are there already."""
    body: dict[str, Any] = {
        "rid": wire_id,
        "input_ids": request.token_ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        # The first token that is told of comes without a logprob.
        "logprob_start_len": request.start - 1,
    }
    if request.top:
        body["top_logprobs_num"] = request.top
    return body


def score_result(request: ScoreRequest, answer: Any) -> ScoreResult:
    """The logprobs of `request.token_ids[start:]`.

    Raises:
        MalformedAnswerError: they are not about these tokens.
        EngineError: they are not finite.
    """
    wanted = list(request.token_ids[request.start :])
    try:
        meta = answer["meta_info"]
        entries = meta["input_token_logprobs"][1:]
        if [_whole(token) for _, token, *_ in entries] != wanted:
            raise ValueError("input_token_logprobs are of other tokens")
        values = [value for value, *_ in entries]
        tops: list[list[tuple[int, float]]] = [[] for _ in wanted]
        if request.top:
            told = meta["input_top_logprobs"][1:]
            tops = [[(_whole(token), float(value)) for value, token, *_ in one] for one in told]
        if len(tops) != len(wanted):
            raise ValueError(f"{len(tops)} places of alternatives for {len(wanted)} tokens")
        version = version_number(str(meta["weight_version"])) or 0
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MalformedAnswerError(
            f"request {request.request_id!r}: the answer is not SGLang's: {_said(error)}"
        ) from error
    return ScoreResult(_finite(request.request_id, values, ()), tops, version)


def version_number(said: str) -> int | None:
    """A weight version as a number; None: the server was told none.

    Raises:
        ValueError: it is none of ours.
    """
    if said == UNSET:
        return None
    if not said.isascii() or not said.isdigit():
        raise ValueError(f"weight version {said!r} is no number")
    return int(said)


def expert_shape(config: Mapping[str, Any]) -> ExpertShape | None:
    """What a model's config.json says of its experts; None for a model without.

    SGLang tells of every layer, also of those that have one feed-forward for all tokens.
    """
    own = config.get("text_config") or config
    layers, top_k = own.get("num_hidden_layers"), own.get("num_experts_per_tok")
    if not isinstance(layers, int) or not isinstance(top_k, int):
        return None
    plain = set(own.get("mlp_only_layers") or ())
    plain |= set(range(own.get("first_k_dense_replace") or 0))
    step = own.get("decoder_sparse_step") or 1
    sparse = tuple(i for i in range(layers) if i not in plain and (i + 1) % step == 0)
    return layers, sparse, top_k


def _routed(
    request: GenerateRequest, meta: Mapping[str, Any], num_new: int, experts: ExpertShape | None
) -> Any:
    """[prompt + response - 1, MoE layers, top_k] int32."""
    encoded = meta.get("routed_experts")
    if not request.return_routed_experts or (encoded is None and not num_new):
        return None  # Not asked for, or aborted before the first step.
    if encoded is None:
        raise RequestRefusedError(
            f"request {request.request_id!r}: the engine recorded no experts; SGLang does with "
            "--enable-return-routed-experts, and only of a mixture-of-experts model"
        )
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
    except binascii.Error as error:
        raise ValueError(f"routed_experts: {error}") from error
    rows = len(request.prompt_ids) + num_new - 1
    if "routed_experts_shape" in meta:
        found = flat.reshape(meta["routed_experts_shape"])
    elif experts is not None:
        layers, sparse, top_k = experts
        found = flat.reshape(-1, layers, top_k)[:, list(sparse)]
    else:
        raise RequestRefusedError(
            f"request {request.request_id!r}: SGLang does not say how many layers and experts it "
            "tells of, and the model's config.json does not either"
        )
    if found.ndim != 3 or len(found) != rows:
        raise ValueError(f"routed_experts {found.shape} of {rows} tokens")
    return found


def _spans(meta: Mapping[str, Any], num_tokens: int) -> tuple[VersionSpan, ...]:
    if not num_tokens:
        return ()
    told = meta.get("weight_versions")
    if told is None:
        told = [{"version": meta["weight_version"], "start": 0, "end": num_tokens}]
    spans = tuple(
        VersionSpan(
            version_number(str(one["version"])) or 0, _whole(one["start"]), _whole(one["end"])
        )
        for one in told
        if one["end"] > one["start"]
    )
    edges = [0, *(edge for span in spans for edge in (span.start, span.end)), num_tokens]
    if any(edges[i] != edges[i + 1] for i in range(0, len(edges), 2)):
        raise ValueError(f"weight_versions {told} of {num_tokens} tokens")
    return spans


def _until(span: VersionSpan, end: int) -> VersionSpan:
    return VersionSpan(span.weight_version, span.start, min(span.end, end))


def _check_count(request: GenerateRequest, ids: Sequence[int], meta: Mapping[str, Any]) -> None:
    counted = meta.get("completion_tokens", len(ids))
    if counted != len(ids):
        raise MalformedAnswerError(
            f"request {request.request_id!r}: {counted} tokens with logprobs of {len(ids)}"
        )


def _finite(request_id: str, values: Sequence[Any], spans: Sequence[VersionSpan]) -> list[float]:
    plain = set(map(type, values)) <= {int, float}
    if not plain or not all(map(math.isfinite, values)):
        version = f" of version {spans[-1].weight_version}" if spans else ""
        raise EngineError(
            f"request {request_id!r}: the model's figures are not finite; its weights{version} are "
            "damaged"
        )
    return list(map(float, values))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
