"""`rollout.generate_utils.prefill_logprobs` (miles): logprobs of finished responses, scored anew by
an engine's prefill. Only with `args.recompute_logprobs_via_prefill`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.compat.modules.http import post
from dovetail.compat.modules.wire import headers_of
from dovetail.types import HookRunError, Sample

__all__ = [
    "recompute_rollout_logprobs_via_prefill",
    "recompute_samples_rollout_logprobs_via_prefill",
]


async def recompute_rollout_logprobs_via_prefill(
    args: Any,
    sample: Sample,
    *,
    url: str,
    sampling_params: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> None:
    """Replace the logprobs of the response by what the engine at `url` (/generate) scores now.

    Raises:
        HookRunError: the engine scored other tokens, or not all.
        ValueError: the sample has no prompt to score from.
    """
    if not getattr(args, "recompute_logprobs_via_prefill", False):
        return
    if Sample.Status(sample.status) is Sample.Status.ABORTED:
        return
    if not sample.response_length:
        sample.rollout_log_probs = []
        return
    answer = await post(url, _request(args, sample, sampling_params), headers=headers)
    sample.rollout_log_probs = _logprobs(sample, answer["meta_info"])
    sample.metadata["rollout_log_probs_source"] = "prefill"


async def recompute_samples_rollout_logprobs_via_prefill(
    args: Any, samples: Sequence[Sample], *, url: str, sampling_params: Mapping[str, Any]
) -> None:
    """As for one sample; before each the engine forgets what it has of earlier requests, so that
    every response is scored in the same way."""
    if not getattr(args, "recompute_logprobs_via_prefill", False):
        return
    for sample in samples:
        await post(url.rpartition("/")[0] + "/flush_cache", {})
        await recompute_rollout_logprobs_via_prefill(
            args,
            sample,
            url=url,
            sampling_params=sampling_params,
            headers=headers_of(args, sample),
        )


def _request(args: Any, sample: Sample, sampling_params: Mapping[str, Any]) -> dict[str, Any]:
    if sample.prompt_length <= 0:
        raise ValueError(f"sample {sample.index} has no prompt token to score its response from")
    wanted = {
        **sampling_params,
        "max_new_tokens": 0,
        "temperature": getattr(args, "rollout_temperature", 1.0),
        "skip_special_tokens": False,
    }
    return {
        "input_ids": sample.tokens,
        "sampling_params": wanted,
        "return_logprob": True,
        # The first scored token has no logprob: begin one before the response.
        "logprob_start_len": sample.prompt_length - 1,
    }


def _logprobs(sample: Sample, meta_info: Mapping[str, Any]) -> list[float]:
    count = sample.response_length
    scored = (meta_info.get("input_token_logprobs") or [])[-count:]
    tokens, expected = [item[1] for item in scored], sample.tokens[-count:]
    if tokens != expected or any(item[0] is None for item in scored):
        raise HookRunError(
            f"the engine scored {len(tokens)} tokens {tokens[:8]} of sample {sample.index}, "
            f"expected the {count} of its response {expected[:8]}"
        )
    return [item[0] for item in scored]
