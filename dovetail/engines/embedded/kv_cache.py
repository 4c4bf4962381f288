"""Keys and values of everything that runs, in one arena per layer, allocated once.

The arena has two ends. Rows (one per running sequence, all of the same capacity, without holes)
grow from the front, so that a decode step reads them as one strided tensor without copying.
Segments (the prompt of a group, stored once) are placed from the back. Where the two would meet, a
reservation fails and the scheduler waits or preempts.

Shapes: K kv heads, D head size, N rows, C row capacity in tokens, P segment length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(eq=False, slots=True)
class Segment:
    """A prompt's keys and values, stored once for its group."""

    offset: int
    length: int
    copied: bool
    """True: rows take a copy of it; False: rows attend to it where it lies."""
    users: int = 0
    routed: Any = None
    """[length, MoE layers, top_k] int32, where its experts were recorded."""


class KVCache:
    """The arena of all layers.

    Args:
        shapes: one entry per layer.
        tokens: how many tokens fit, rows and segments together.
    """

    def __init__(
        self, shapes: list[LayerShape], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = shapes
        self.tokens = tokens
        self.dtype = dtype
        self.device = device
        self.num_rows = 0
        self.row_capacity = 0
        self.layouts = 0
        """Counts changes of where rows lie; whoever keeps views compares it."""
        self._segments: list[Segment] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._allocate()

    @property
    def used_tokens(self) -> int:
        """Tokens reserved by rows and segments."""
        return self.num_rows * self.row_capacity + sum(s.length for s in self._segments)

    @property
    def free_for_rows(self) -> int:
        """Tokens that rows could take if segments lay without holes."""
        return self.tokens - sum(s.length for s in self._segments)

    @property
    def rows_may_reach(self) -> int:
        """Where the lowest segment begins."""
        return self._segments[-1].offset if self._segments else self.tokens

    def reserve_rows(self, num_rows: int, capacity: int) -> bool:
        """Make room for `num_rows` rows of at least `capacity` tokens; False if there is none.

        Rows that exist keep their contents; the capacity never shrinks while rows exist.
        """
        if self.num_rows:
            capacity = max(capacity, self.row_capacity)
        if num_rows * capacity > self.free_for_rows:
            return False
        if num_rows * capacity > self.rows_may_reach:
            self._pack_segments()
        if capacity != self.row_capacity:
            self._relayout(capacity)
        self.num_rows = num_rows
        return True

    def drop_row(self, row: int, last_length: int) -> None:
        """Give row `row` up: the last row, `last_length` tokens long, moves into its place."""
        last = self.num_rows - 1
        if row != last:
            for keys, values in self._row_views(self.num_rows):
                keys[row, :, :last_length] = keys[last, :, :last_length]
                values[row, :, :last_length] = values[last, :, :last_length]
        self.num_rows = last

    def new_segment(self, length: int, copied: bool) -> Segment | None:
        """Place a segment at the back, in the first hole that fits; None if there is none."""
        if length > self.free_for_rows - self.num_rows * self.row_capacity:
            return None
        offset = self._hole(length)
        if offset is None:
            self._pack_segments()
            offset = self._hole(length)
        if offset is None:
            return None
        segment = Segment(offset, length, copied)
        self._segments.append(segment)
        self._segments.sort(key=lambda s: s.offset, reverse=True)
        return segment

    def free_segment(self, segment: Segment) -> None:
        self._segments.remove(segment)

    def rows(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views `[num_rows, K, length, D]` of keys and values."""
        shape, capacity = self.shapes[layer], self.row_capacity
        return (
            _as_rows(self._keys[layer], num_rows, shape.kv_heads, capacity, shape.key_dim, length),
            _as_rows(
                self._values[layer], num_rows, shape.kv_heads, capacity, shape.value_dim, length
            ),
        )

    def segment(self, layer: int, segment: Segment) -> tuple[Tensor, Tensor]:
        """Views `[K, P, D]` of keys and values."""
        shape = self.shapes[layer]
        return (
            _as_segment(self._keys[layer], segment, shape.kv_heads, shape.key_dim),
            _as_segment(self._values[layer], segment, shape.kv_heads, shape.value_dim),
        )

    def copy_segment_to_row(self, segment: Segment, row: int) -> None:
        for layer in range(len(self.shapes)):
            from_keys, from_values = self.segment(layer, segment)
            keys, values = self.rows(layer, self.num_rows, segment.length)
            keys[row] = from_keys
            values[row] = from_values

    def clear(self) -> None:
        """Forget rows, segments and every number: a NaN left in a masked place would spread."""
        self.release()
        self._allocate()

    def release(self) -> None:
        """Give the memory back; the cache is unusable afterwards."""
        self.num_rows = 0
        self._segments.clear()
        self._keys.clear()
        self._values.clear()

    def _allocate(self) -> None:
        self.layouts += 1
        for shape in self.shapes:
            width = self.tokens * shape.kv_heads
            self._keys.append(_zeros(width * shape.key_dim, self.dtype, self.device))
            self._values.append(_zeros(width * shape.value_dim, self.dtype, self.device))

    def _row_views(self, num_rows: int) -> list[tuple[Tensor, Tensor]]:
        return [self.rows(i, num_rows, self.row_capacity) for i in range(len(self.shapes))]

    def _relayout(self, capacity: int) -> None:
        old = self._row_views(self.num_rows)
        kept, self.row_capacity = self.row_capacity, capacity
        self.layouts += 1
        new = self._row_views(self.num_rows)
        # Last row first: a row's new place reaches only over rows that have already moved on.
        for row in reversed(range(self.num_rows)):
            for (old_keys, old_values), (keys, values) in zip(old, new, strict=True):
                keys[row, :, :kept] = old_keys[row].clone()
                values[row, :, :kept] = old_values[row].clone()

    def _hole(self, length: int) -> int | None:
        top = self.tokens
        for segment in self._segments:
            if top - (segment.offset + segment.length) >= length:
                return top - length
            top = segment.offset
        return top - length if top - length >= self.num_rows * self.row_capacity else None

    def _pack_segments(self) -> None:
        top = self.tokens
        for segment in self._segments:
            target = top - segment.length
            if target != segment.offset:
                self._move_segment(segment, target)
            top = target

    def _move_segment(self, segment: Segment, offset: int) -> None:
        contents = [self.segment(i, segment) for i in range(len(self.shapes))]
        contents = [(keys.clone(), values.clone()) for keys, values in contents]
        segment.offset = offset
        for layer, (old_keys, old_values) in enumerate(contents):
            keys, values = self.segment(layer, segment)
            keys.copy_(old_keys)
            values.copy_(old_values)


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    # calloc: pages that no token ever reaches are never touched (torch.zeros would write them all).
    raw = np.zeros(count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


def _as_rows(flat: Tensor, rows: int, heads: int, capacity: int, dim: int, length: int) -> Tensor:
    return flat[: rows * heads * capacity * dim].view(rows, heads, capacity, dim)[:, :, :length]


def _as_segment(flat: Tensor, segment: Segment, heads: int, dim: int) -> Tensor:
    width = heads * dim
    start = segment.offset * width
    return flat[start : start + segment.length * width].view(heads, segment.length, dim)
