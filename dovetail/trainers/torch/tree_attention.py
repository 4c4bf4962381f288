"""Attention over a packed line of trees: every token attends to its own sequence only, and siblings
share their prompt's keys and values.

It is an attention implementation for transformers models (`ALL_ATTENTION_FUNCTIONS`), so any model
that looks its attention up there can run packed lines; the line's segments come as the keyword
`tree_line`. Nothing here is quadratic in the length of the line. A response's attention is that
over its prompt and that over itself, merged by their log-sum-exp (cascade attention,
flashinfer.ai/2024/02/02/cascade-inference.html).

Shapes: T tokens of the line, A query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.batch.pack import Segment

NAME = "dovetail_tree"
FLOAT32_BELOW = 384
"""With fewer keys torch's CPU flash kernel is up to 3.5 times as fast in float32 as in bfloat16."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TreeAttentionUnsupportedError(NotImplementedError):
    """The model asks for something that packed lines do not do; padded rows are used instead."""


def check_asked(told: Any, attention_mask: torch.Tensor | None, more: Mapping[str, Any]) -> None:
    """Refuse what is more than plain causal attention.

    Args:
        told: our own keyword; None: it did not arrive.
        more: the other keywords of transformers' attention interface.

    Raises:
        TreeAttentionUnsupportedError: no keyword arrived, or logits are capped, masked or biased.
    """
    if told is None:
        raise TreeAttentionUnsupportedError(
            "the model does not hand keywords down to its attention"
        )
    for name in ("softcap", "s_aux", "position_bias", "attention mask"):
        if {**more, "attention mask": attention_mask}.get(name) is not None:
            raise TreeAttentionUnsupportedError(f"the model's attention uses {name}")


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree_line: Sequence[Segment] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, A, T, D], key and value [1, K, T, D]; the
    output is [1, T, A, D].

    Sliding windows are the caller's matter: no sequence of the line may be longer than the window.

    Raises:
        TreeAttentionUnsupportedError: see `check_asked`.
    """
    check_asked(tree_line, attention_mask, kwargs)
    assert tree_line is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        out = _CascadeCpu.apply(query, key, value, tree_line, scale)
    else:
        out = attention_by_segment(query, key, value, tree_line, scale)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, tree_attention)


def attention_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    line: Sequence[Segment],
    scale: float,
) -> torch.Tensor:
    """The same by public operations, for any device: prompt keys stand before each sibling's
    own."""
    lengths = [segment.length for segment in line]
    starts = {segment.start: i for i, segment in enumerate(line)}
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    outs = []
    for i, segment in enumerate(line):
        own_key, own_value, mask = keys[i], values[i], None
        if segment.prefix_length:
            prefix = starts[segment.prefix_start]
            own_key = torch.cat([keys[prefix], own_key], 2)
            own_value = torch.cat([values[prefix], own_value], 2)
            shape = (segment.length, segment.prefix_length + segment.length)
            mask = torch.ones(shape, dtype=torch.bool, device=query.device)
            mask = mask.tril(segment.prefix_length)
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                queries[i],
                own_key,
                own_value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outs, 2)


def _branches(line: Sequence[Segment]) -> list[tuple[int, int, int, int]]:
    """`(first branch token, end, prefix start, prefix end)` of each tree that shares its prompt."""
    found: list[tuple[int, int, int, int]] = []
    for segment in line:
        if not segment.prefix_length:
            continue
        prefix = (segment.prefix_start, segment.prefix_start + segment.prefix_length)
        end = segment.start + segment.length
        if found and found[-1][2:] == prefix:
            found[-1] = (found[-1][0], end, *prefix)
        else:
            found.append((segment.start, end, *prefix))
    return found


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if key.shape[2] < FLOAT32_BELOW:
        query, key, value = query.float(), key.float(), value.float()
    result: tuple[torch.Tensor, torch.Tensor] = _forward(
        query, key, value, 0.0, causal, scale=scale
    )
    return result


def _flash_backward(
    tensors: Sequence[torch.Tensor], lse: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    """`tensors`: gradient of the output, query, key, value, output."""
    if tensors[2].shape[2] < FLOAT32_BELOW:
        tensors = [x.float() for x in tensors]
    result: tuple[torch.Tensor, ...] = _backward(*tensors, lse, 0.0, causal, scale=scale)
    return result


class _CascadeCpu(torch.autograd.Function):
    """Flash attention by pieces. The backward of a piece needs only the merged output and
    log-sum-exp."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        line: Sequence[Segment],
        scale: float,
    ) -> torch.Tensor:
        _, heads, tokens, size = query.shape
        out = query.new_empty(1, tokens, heads, size).transpose(1, 2)
        lse = query.new_empty(1, tokens, heads, dtype=torch.float32).transpose(1, 2)
        for segment in line:
            own = slice(segment.start, segment.start + segment.length)
            out[:, :, own], lse[:, :, own] = _flash(
                query[:, :, own], key[:, :, own], value[:, :, own], True, scale
            )
        for start, end, prefix_start, prefix_end in _branches(line):
            own, prefix = slice(start, end), slice(prefix_start, prefix_end)
            prefix_out, prefix_lse = _flash(
                query[:, :, own], key[:, :, prefix], value[:, :, prefix], False, scale
            )
            own_lse = lse[:, :, own]
            # sigmoid(a - b) = exp(a) / (exp(a) + exp(b)): the prefix's share of the softmax mass.
            share = torch.sigmoid(prefix_lse - own_lse).unsqueeze(-1)
            out[:, :, own] = torch.lerp(out[:, :, own].float(), prefix_out.float(), share)
            lse[:, :, own] = torch.logaddexp(prefix_lse, own_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.line, ctx.scale = line, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]

        def piece(own: slice, seen: slice, causal: bool) -> tuple[torch.Tensor, ...]:
            pairs = ((grad_out, own), (query, own), (key, seen), (value, seen), (out, own))
            tensors = [x[:, :, where] for x, where in pairs]
            return _flash_backward(tensors, lse[:, :, own], causal, ctx.scale)

        for segment in ctx.line:
            own = slice(segment.start, segment.start + segment.length)
            for grad, part in zip(grads, piece(own, own, True), strict=True):
                grad[:, :, own] = part
        for start, end, prefix_start, prefix_end in _branches(ctx.line):
            own, prefix = slice(start, end), slice(prefix_start, prefix_end)
            parts = piece(own, prefix, False)
            for grad, part, where in zip(grads, parts, (own, prefix, prefix), strict=True):
                grad[:, :, where] += part
        return (*grads, None, None)
