"""Attention of one new token per row: over the row itself, and over a prompt that its group shares.

The prompt of a group is read once for all siblings (their queries stand side by side as one
matrix);
the two partial softmaxes are put together by their log-sum-exp, as in Juravsky et al., "Hydragen:
High-Throughput LLM Inference with Shared Prefixes" (arXiv 2402.05099, section 3).

Shapes: N rows, M rows with a shared prompt, K kv heads, R queries per kv head, D head size, L
places of the longest row, P prompt length, G siblings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.engines.embedded.batch import PrefixGroups

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Above this many places the CPU's bfloat16 kernel beats converting keys and values to float32
# (measured).
_CONVERT_PLACES = 6144


class Scratch:
    """One float32 buffer that conversions reuse: a fresh megabyte per layer costs page faults."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def float32(self, tensor: Tensor) -> Tensor:
        """`tensor` in float32; what the last call gave is overwritten."""
        if tensor.dtype == torch.float32:
            return tensor
        if tensor.device.type != "cpu":
            return tensor.float()
        if self._buffer.numel() < tensor.numel():
            self._buffer = torch.empty(2 * tensor.numel())
        return self._buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)


def attend_prefixes(
    queries: Tensor, groups: PrefixGroups, views: list[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of all rows to their shared prompts.

    Args:
        queries: [N, K, R, D].
        views: keys and values `[K, P, D]` of each group's segment.

    Returns:
        [N, K, R, D] and log-sum-exp [N, K, R] float32; 0 and -inf for rows without a segment.
    """
    n, heads, per_head, dim = queries.shape
    ordered = queries if groups.order is None else queries[groups.order]
    m = ordered.shape[0]
    flat = ordered.transpose(0, 1).reshape(1, heads, m * per_head, dim)
    outputs, lses, start = [], [], 0
    for (keys, values), size in zip(views, groups.sizes, strict=True):
        end = start + size * per_head
        output, lse = _attend_with_lse(flat[:, :, start:end], keys, values, scale)
        outputs.append(output)
        lses.append(lse)
        start = end
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    lse = lses[0] if len(lses) == 1 else torch.cat(lses, 2)
    output = output.view(heads, m, per_head, -1).transpose(0, 1)
    lse = lse.view(heads, m, per_head).transpose(0, 1)
    if groups.order is None:
        return output, lse
    all_output = torch.zeros(
        n, heads, per_head, output.shape[-1], dtype=output.dtype, device=output.device
    )
    all_lse = torch.full((n, heads, per_head), float("-inf"), device=lse.device)
    return all_output.index_copy_(0, groups.order, output), all_lse.index_copy_(
        0, groups.order, lse
    )


def _attend_with_lse(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`[1, K, G*R, D]` over `[K, P, D]`; returns the output and [1, K, G*R] log-sum-exp."""
    if queries.device.type == "cpu":
        output, lse = _flash_cpu(queries, keys[None], values[None], scale=scale)
        return output.contiguous(), lse.float().contiguous()
    scores = (queries @ keys.transpose(-1, -2)).float() * scale
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None,
    scratch: Scratch,
) -> Tensor:
    """Attention of each row to its own places, and to the part already attended to.

    Args:
        queries: [N, K, R, D].
        keys, values: [N, K, L, D].
        mask: [N, L] bool, True where a row may look; None where all may look everywhere.
        prefix: what `attend_prefixes` gave, or None.

    Returns:
        [N, K*R*D] in the dtype of the queries.
    """
    n, length = queries.shape[0], keys.shape[2]
    on_cpu = queries.device.type == "cpu"
    small = queries.dtype == torch.float32 or n * length <= _CONVERT_PLACES
    if on_cpu and not small:
        output = _attend_rows_flash(queries, keys, values, mask, scale, prefix)
    elif on_cpu or prefix is not None:
        output = _attend_rows_float32(queries, keys, values, mask, scale, prefix, scratch)
    else:
        bias = None if mask is None else mask[:, None, None]
        output = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, scale=scale
        )
    return output.to(queries.dtype).reshape(n, -1)


def _attend_rows_flash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=queries.dtype).masked_fill_(~mask, float("-inf"))
        bias = bias[:, None, None]
    output, lse = _flash_cpu(queries, keys, values, attn_mask=bias, scale=scale)
    if prefix is None:
        return output
    prefix_output, prefix_lse = prefix
    share = torch.sigmoid(prefix_lse - lse.float())[..., None]
    return torch.lerp(output.float(), prefix_output.float(), share)


def _attend_rows_float32(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    prefix: tuple[Tensor, Tensor] | None,
    scratch: Scratch,
) -> Tensor:
    n, heads, per_head, dim = queries.shape
    length = keys.shape[2]
    queries = queries.float().reshape(n * heads, per_head, dim)
    keys = scratch.float32(keys).flatten(0, 1)
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    values = scratch.float32(values).flatten(0, 1)
    if mask is not None:
        scores.view(n, heads, per_head, length).masked_fill_(~mask[:, None, None], float("-inf"))
    if prefix is None:
        return torch.bmm(scores.softmax(-1), values).view(n, heads * per_head * dim)
    # The prompt's part joins the softmax as one more place, whose score is its log-sum-exp.
    prefix_output, prefix_lse = prefix
    scores = torch.cat([scores, prefix_lse.reshape(n * heads, per_head, 1)], -1)
    weights = scores.softmax(-1)
    output = torch.bmm(weights[..., :length], values)
    prefix_part = prefix_output.float().reshape(n * heads, per_head, dim) * weights[..., length:]
    return output.add_(prefix_part).view(n, heads * per_head * dim)
