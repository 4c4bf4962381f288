"""Replay of expert choices: every pass of training sends a token to the experts that were recorded
for it, whatever the weights would choose by now.

Two records. R2 (`use_routing_replay`; Zheng et al., "Group Sequence Policy Optimization",
arXiv:2507.18071, section 5.3): the pass that computes old logprobs records, and later passes over
the same rows replay, so that the ratio of new to old compares the same experts. R3
(`use_rollout_routing_replay`; Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning
Training and Inference Routers", arXiv:2510.11370): the engine records when it samples,
and all passes replay, old logprobs included. Replayed are the experts' numbers; the gates are the
training router's scores at them, weighed up as the model does, so the gradient reaches the router.

Shapes: T flat positions of a micro-batch (padding included), L mixture-of-experts layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dovetail.batch.pack import Span
from dovetail.batch.rows import TrainRow
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.types.errors import TrainError

UNKNOWN = -1


class RoutingRecords:
    """The records of one rollout's rows. A backend derives its replay from it.

    Args:
        layers: mixture-of-experts layers of the model.
        top_k: experts of a token in each of them, out of `experts`.
        from_rollout: replay what rows bring (R3); otherwise record in passes without gradient (R2).
    """

    def __init__(self, layers: int, top_k: int, experts: int, *, from_rollout: bool) -> None:
        self.layers, self.top_k, self.experts = layers, top_k, experts
        self.from_rollout = from_rollout
        self._rows: Sequence[TrainRow] = ()
        self._known: dict[int, torch.Tensor] = {}
        """[tokens of the row, L, top_k] int32, -1 where nothing is recorded."""
        self._counts = torch.zeros(2, dtype=torch.float64)
        """Replaced and replayed choices."""

    @contextlib.contextmanager
    def of(self, rows: Sequence[TrainRow]) -> Iterator[None]:
        """Inside the block positions of rows are those of `rows`; nothing is kept after it.

        Raises:
            TrainError: under R3, a row that trains has no record, or a row has one of another
                shape.
        """
        self._rows, self._known = rows, {}
        if self.from_rollout:
            for i, row in enumerate(rows):
                # What trains nothing needs none: hooks may make rows that were never sampled.
                if any(row.loss_mask) or row.extra.get("rollout_routed_experts") is not None:
                    found = _by_rollout(row, self.layers, self.top_k, self.experts)
                    self._known[i] = torch.from_numpy(found)
        try:
            yield
        finally:
            self._rows, self._known = (), {}

    def share(self, parallel: DataParallel) -> None:
        """Every rank learns what the others have recorded in a pass without gradients."""
        if self.from_rollout or parallel.group is None or not self._rows:
            return
        lengths = [len(row.tokens) for row in self._rows]
        every = self._blank(sum(lengths))
        for i, part in enumerate(every.split(lengths)):
            if i in self._known:
                part.copy_(self._known[i])
        for i, part in enumerate(parallel.known(every.to(parallel.device)).cpu().split(lengths)):
            if bool((part != UNKNOWN).any()):
                self._known[i] = part

    def take_metrics(self, parallel: DataParallel = ALONE) -> dict[str, float]:
        """`train/routing_replaced`: the share of replayed choices (a token in a layer) in passes
        with gradient on all ranks since the last call in which the router would have taken other
        experts."""
        replaced, replayed = parallel.summed(self._counts.to(parallel.device)).tolist()
        self._counts = torch.zeros(2, dtype=torch.float64)
        return {"train/routing_replaced": replaced / replayed} if replayed else {}

    def _count(self, own_Tk: torch.Tensor, chosen_Tk: torch.Tensor, counts: torch.Tensor) -> None:
        """Of the tokens that count, [T] bool, how many the router would have sent elsewhere."""
        differs = (own_Tk.sort(-1).values != chosen_Tk.sort(-1).values).any(-1)
        both = torch.stack([(differs & counts).sum(), counts.sum()])
        self._counts = self._counts.to(both.device) + both

    def _told(self, spans: Sequence[Span], places: int) -> torch.Tensor:
        """What is recorded of flat positions, [places, L, top_k] int64, -1 where nothing is."""
        told = self._blank(places).long()
        for span in spans:
            known = self._known.get(span.row)
            if known is not None:
                own = known[span.first : span.first + span.length]
                told[span.start : span.start + span.length] = own.long()
        return told

    def _record_of(self, span: Span) -> torch.Tensor:
        """The record of these tokens, to be written, [length, L, top_k]."""
        if span.row not in self._known:
            self._known[span.row] = self._blank(len(self._rows[span.row].tokens))
        return self._known[span.row][span.first : span.first + span.length]

    def _blank(self, tokens: int) -> torch.Tensor:
        return torch.full((tokens, self.layers, self.top_k), UNKNOWN, dtype=torch.int32)


def _by_rollout(
    row: TrainRow, layers: int, top_k: int, experts: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The experts that a row brings, [tokens, layers, top_k] int32; -1 for its last token, after
    which nothing was fed.

    Raises:
        TrainError: it brings none, or of another shape.
    """
    given = row.extra.get("rollout_routed_experts")
    if given is None:
        raise TrainError(
            f"sample {row.index}: rollout_routed_experts is unknown, but "
            "use_rollout_routing_replay trains each token through the experts that the engine "
            "sent it to; a generate function asks for them with "
            "GenerateRequest(return_routed_experts=True) or, over HTTP, return_routed_experts, "
            "and sets Sample.rollout_routed_experts; a conversion hands the column on; or use "
            "--use-routing-replay (TOML: algorithm.use_routing_replay), which needs none"
        )
    expected = (len(row.tokens) - 1, layers, top_k)
    try:
        routed = np.asarray(given)
    except (TypeError, ValueError):
        routed = np.empty(0)
    if routed.shape != expected or not np.issubdtype(routed.dtype, np.integer):
        raise TrainError(
            f"sample {row.index}: rollout_routed_experts has the shape {list(routed.shape)} "
            f"and dtype {routed.dtype}, expected whole numbers {list(expected)}: tokens - 1, "
            "mixture-of-experts layers, experts per token"
        )
    if routed.min(initial=0) < 0 or routed.max(initial=0) >= experts:
        raise TrainError(
            f"sample {row.index}: rollout_routed_experts has experts from {routed.min()} to "
            f"{routed.max()}, the model has 0 to {experts - 1}"
        )
    # Nothing was fed after the last token.
    return np.concatenate([routed, np.full_like(routed[:1], UNKNOWN)]).astype(np.int32)
