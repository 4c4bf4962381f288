"""What an engine's answer says about itself, as attributes of a span."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.observe.trace import TRACE_CHILDREN_KEY

_KEPT = (
    "id",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "weight_version",
    "e2e_latency",
    "queue_time",
    "prefill_launch_latency",
    "decode_throughput",
    "spec_accept_token_num",
    "spec_draft_token_num",
    "spec_verify_ct",
)
_STAGES = ("prefill", "decode")


def build_sglang_meta_trace_attrs(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes out of the `meta_info` of SGLang's /generate: counts, times, finish reason.

    Durations of a prefill/decode split (`pd_prefill_...`, `pd_decode_...`, seconds) become spans
    of their own under `TRACE_CHILDREN_KEY`.

    Example:
        >>> build_sglang_meta_trace_attrs({"prompt_tokens": 3, "finish_reason": {"type": "stop"}})
        {'prompt_tokens': 3, 'finish_reason': 'stop'}
    """
    return _attrs(meta, "sglang")


def build_vllm_meta_trace_attrs(output: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes out of an answer of vLLM's /inference/v1/generate, or of a `meta_info` made of
    one.
    """
    if not isinstance(output, Mapping):
        return {}
    flat = dict(output)
    if isinstance(output.get("usage"), Mapping):
        flat |= output["usage"]
        details = output["usage"].get("prompt_tokens_details")
        if isinstance(details, Mapping) and details.get("cached_tokens") is not None:
            flat.setdefault("cached_tokens", details["cached_tokens"])
    choices = output.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        flat["finish_reason"] = choices[0].get("finish_reason")
    return _attrs(flat, "vllm")


def _attrs(meta: Mapping[str, Any] | None, engine: str) -> dict[str, Any]:
    if not isinstance(meta, Mapping):
        return {}
    attrs = {name: meta[name] for name in _KEPT if meta.get(name) is not None}
    reason = meta.get("finish_reason")
    if isinstance(reason, Mapping):
        reason = reason.get("type")
    if reason is not None:
        attrs["finish_reason"] = reason
    children = [child for stage in _STAGES if (child := _stage(meta, engine, stage)) is not None]
    if children:
        attrs[TRACE_CHILDREN_KEY] = children
    return attrs


def _stage(meta: Mapping[str, Any], engine: str, stage: str) -> dict[str, Any] | None:
    prefix = f"pd_{stage}_"
    parts: list[dict[str, Any]] = [
        {
            "name": name.removeprefix(prefix).removesuffix("_duration"),
            "duration": value,
            "attrs": {name: value},
        }
        for name, value in meta.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    ]
    if not parts:
        return None
    total = sum(part["duration"] for part in parts if part["name"] != "total")
    return {"name": f"{engine}_pd_{stage}", "duration": total, "attrs": {}, "children": parts}
