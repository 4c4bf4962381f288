"""Decode steps replayed as CUDA graphs: one launch per step instead of some twenty per layer.

A graph is captured per (rows, length) bucket on the first step that needs it. What fills a bucket
up are rows of their own behind the running ones, in room that nobody holds; where there is none,
or where rows attend to a shared segment where it lies, the step runs without a graph. If a
capture fails, no graph is tried again and the reason is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dovetail.engines.embedded.batch import RowBatch
from dovetail.engines.embedded.runner_fused import FusedRunner

_LENGTH_STEP = 256
_ROW_STEP = 8
_log = logging.getLogger(__name__)

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes a step, returns what replays it."""


def capture_cuda(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture `step` as a CUDA graph; the step is also run, so that its results are in place."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class GraphedDecode:
    """`runner.decode`, through graphs where a step allows it."""

    def __init__(
        self, runner: FusedRunner, max_running: int, capture: Capture = capture_cuda
    ) -> None:
        self._runner = runner
        self._capture = capture
        self._graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._captured_at: tuple[int, tuple[int, ...]] | None = None
        self.failure: str | None = None
        """Why no graph is used any more."""
        self.replays = 0
        device = runner.cache.device
        most = _bucket(max_running, _ROW_STEP)
        self._tokens, self._positions, self._kv_lengths = (
            torch.zeros(most, dtype=torch.long, device=device) for _ in range(3)
        )
        self._rows = torch.arange(most, device=device)

    def __call__(self, batch: RowBatch) -> Tensor:
        """Logits [N, V] float32, as `Runner.decode` gives them."""
        cache = self._runner.cache
        rows = _bucket(batch.size, _ROW_STEP)
        length = min(_bucket(batch.longest, _LENGTH_STEP), cache.row_capacity)
        fits = rows * cache.row_capacity <= cache.rows_may_reach
        if self.failure is not None or batch.groups.segments or not fits:
            return self._runner.decode(batch)
        lies_at = (cache.layouts, self._runner.weights_at)
        if self._captured_at != lies_at:
            self._graphs.clear()
            self._captured_at = lies_at
        self._fill(batch, rows)
        if (rows, length) not in self._graphs and not self._add(batch, rows, length):
            return self._runner.decode(batch)
        self.replays += 1
        return self._graphs[rows, length]()[: batch.size].clone()

    def _fill(self, batch: RowBatch, rows: int) -> None:
        for static, values in (
            (self._tokens, batch.tokens),
            (self._positions, batch.positions),
            (self._kv_lengths, batch.kv_lengths),
        ):
            static[: batch.size] = values
            static[batch.size : rows] = 0

    def _add(self, batch: RowBatch, rows: int, length: int) -> bool:
        places = torch.arange(length, device=self._rows.device)
        kv_lengths = self._kv_lengths[:rows]
        static: Any = SimpleNamespace(
            size=rows,
            tokens=self._tokens[:rows],
            positions=self._positions[:rows],
            kv_lengths=kv_lengths,
            rows=self._rows[:rows],
            longest=length,
            ragged=True,
            groups=batch.groups,
            visible=lambda: places[None] <= kv_lengths[:, None],
        )
        try:
            self._graphs[rows, length] = self._capture(lambda: self._runner.decode(static))
        except RuntimeError as error:
            # Eager steps compute the same; only time is lost.
            self.failure = f"{type(error).__name__}: {error}"
            _log.warning("decoding without CUDA graphs: capturing a step failed: %s", self.failure)
            return False
        return True


def _bucket(count: int, step: int) -> int:
    """Powers of two up to `step`, then its multiples."""
    if count >= step:
        return -(-count // step) * step
    return 1 << (count - 1).bit_length()
