"""`backends.megatron_utils.cp_utils`, `backends.training_utils.cp_utils`: context parallelism.

A sequence is never split here: the context-parallel size is 1, where gathering and slicing leave
everything as it is. A larger size is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dovetail.algorithms.packed_logits import get_sum_of_sample_mean
from dovetail.types.errors import ConfigError

__all__ = [
    "all_gather_with_cp",
    "get_logits_and_tokens_offset_with_cp",
    "get_sum_of_sample_mean",
    "slice_log_prob_with_cp",
    "slice_with_cp",
]

Offsets = tuple[tuple[int, int], tuple[int, int]]


def all_gather_with_cp(
    tensor: torch.Tensor, total_length: int, response_length: int, *state: Any, **options: Any
) -> torch.Tensor:
    """The values at all `response_length` tokens: `tensor` itself.

    Raises:
        ConfigError: a parallel state of more than one rank.
        ValueError: it has another length.
    """
    _check_one_rank(state, options)
    _check_length(tensor, response_length)
    return tensor


def slice_log_prob_with_cp(
    log_prob: Any, total_length: int, response_length: int, *state: Any, **options: Any
) -> Any:
    """This rank's part of values at all response tokens: `log_prob` itself.

    Raises:
        ConfigError: a parallel state of more than one rank.
        ValueError: it has another length.
    """
    _check_one_rank(state, options)
    _check_length(log_prob, response_length)
    return log_prob


def slice_with_cp(tokens: torch.Tensor, pad_value: Any, *state: Any, **options: Any) -> Any:
    """This rank's part of a sequence: `tokens` itself, without padding.

    Raises:
        ConfigError: a parallel state of more than one rank.
    """
    _check_one_rank(state, options)
    return tokens


def get_logits_and_tokens_offset_with_cp(
    total_length: int, response_length: int, *state: Any, **options: Any
) -> tuple[int, Offsets, Offsets, Offsets]:
    """Size of the two chunks of a rank, and from where to where they reach: the chunks, the logits
    that predict the response in them, and its tokens; (0, 0) where a chunk has none.

    Raises:
        ConfigError: a parallel state of more than one rank.
    """
    _check_one_rank(state, options)
    size = -(-total_length // 2)
    chunks = ((0, size), (size, 2 * size))
    first = total_length - response_length - 1
    logits = [(max(start, first), min(end, total_length - 1)) for start, end in chunks]
    inside = [(start, end) if start < end else (0, 0) for start, end in logits]
    tokens = [(start + 1, end + 1) if start < end else (0, 0) for start, end in inside]
    return size, chunks, (inside[0], inside[1]), (tokens[0], tokens[1])


def _check_one_rank(state: Sequence[Any], options: dict[str, Any]) -> None:
    for value in (*state, *options.values()):
        size = getattr(value, "cp_size", getattr(getattr(value, "cp", None), "size", 1))
        if isinstance(size, int) and size > 1:
            raise ConfigError(
                f"context parallelism over {size} ranks: a run of dovetail keeps each sequence on "
                "one device (--context-parallel-size 1)"
            )


def _check_length(values: Any, length: int) -> None:
    if len(values) != length:
        raise ValueError(f"{len(values)} values for a response of {length} tokens")
