"""Replay of expert choices in Megatron's routers; what is replayed and why is said in
`dovetail.trainers.torch.routing`.

A router asks an object of megatron-core's for the experts of its tokens
(`megatron.core.transformer.moe.router_replay`). Ours knows which micro-batch passes: under a
pipeline several do at once, and a layer that is recomputed in a backward pass asks again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dovetail.batch.rows import TrainRow
from dovetail.trainers.megatron.line import PADDING, Line
from dovetail.trainers.megatron.parallel import Ranks
from dovetail.trainers.megatron.provider import bare
from dovetail.trainers.torch.routing import routed_by_rollout

_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's choices."""

    layers: int
    top_k: int
    experts: int


class Replay:
    """The records of one rollout's rows on all ranks, and their replay.

    Args:
        from_rollout: replay what rows bring (R3); otherwise record in passes without gradient (R2).
    """

    def __init__(self, chunks: Sequence[Any], ranks: Ranks, *, from_rollout: bool):
        self.ranks, self.from_rollout = ranks, from_rollout
        self.routers = {id(chunk): _routers(chunk) for chunk in chunks}
        config = bare(chunks[0]).config
        self.shape = Shape(config.num_layers, config.moe_router_topk, config.num_moe_experts)
        self.splits_sequence = config.sequence_parallel
        self._rows: Sequence[TrainRow] = ()
        self._known: dict[int, torch.Tensor] = {}
        """[tokens of the row, L, top_k] int32, -1 where nothing is recorded."""
        self._counts = torch.zeros(2)

    @contextlib.contextmanager
    def of(self, rows: Sequence[TrainRow]) -> Iterator[None]:
        """Inside the block positions of rows are those of `rows`; nothing is kept after it.

        Raises:
            TrainError: under R3, a row that trains has no record, or one of another shape.
        """
        self._rows, self._known = rows, {}
        if self.from_rollout:
            for i, row in enumerate(rows):
                if any(row.loss_mask) or row.extra.get("rollout_routed_experts") is not None:
                    found = routed_by_rollout(
                        row, self.shape.layers, self.shape.top_k, self.shape.experts
                    )
                    self._known[i] = torch.from_numpy(found)
        try:
            yield
        finally:
            self._rows, self._known = (), {}

    def begin(self) -> None:
        """A pass starts."""
        for routers in self.routers.values():
            for router in routers.values():
                router.queue.clear()

    def enter(self, chunk: Any, line: Line) -> None:
        """The chunk's forward over this line starts."""
        told = self._told(line)
        for layer, router in self.routers[id(chunk)].items():
            router.enter(told[:, layer].to(self.ranks.device))

    def leave(self, chunk: Any, line: Line, *, records: bool) -> None:
        """It has ended."""
        for layer, router in self.routers[id(chunk)].items():
            told, chosen, own = router.leave()
            if records and not self.from_rollout:
                self._record(line, layer, chosen)
            elif not records:
                self._count(told, chosen, own)

    def share(self) -> None:
        """Every rank learns what the others have recorded in a pass without gradients."""
        if self.from_rollout or not self._rows:
            return
        shape = (self.shape.layers, self.shape.top_k)
        lengths = [len(row.tokens) for row in self._rows]
        blank = torch.full((sum(lengths), *shape), _UNKNOWN, dtype=torch.int32)
        for part, i in zip(blank.split(lengths), range(len(lengths)), strict=True):
            if i in self._known:
                part.copy_(self._known[i])
        every = blank.to(self.ranks.device)
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        for i, part in enumerate(every.cpu().split(lengths)):
            if bool((part != _UNKNOWN).any()):
                self._known[i] = part

    def take_metrics(self) -> dict[str, float]:
        """See `dovetail.trainers.torch.routing.RoutingReplay.take_metrics`; over all ranks."""
        counts = self._counts.to(self.ranks.device)
        self._counts = torch.zeros(2)
        dist.all_reduce(counts)
        replaced, replayed = counts.tolist()
        return {"train/routing_replaced": replaced / replayed} if replayed else {}

    def _flat_of_rank(self, line: Line) -> torch.Tensor:
        """Flat positions of the tokens that this rank's routers see."""
        if not self.splits_sequence:
            return line.flat_S
        return line.flat_S.chunk(self.ranks.tp_size)[self.ranks.tp]

    def _told(self, line: Line) -> torch.Tensor:
        """[tokens, L, top_k] int64, -1 where nothing is recorded."""
        flat_s = self._flat_of_rank(line)
        width = 1 if line.batch is None else line.batch.input_ids_BT.numel()
        told = torch.full((width + 1, self.shape.layers, self.shape.top_k), _UNKNOWN)
        for span in () if line.batch is None else line.batch.spans:
            known = self._known.get(span.row)
            if known is not None:
                own = known[span.first : span.first + span.length]
                told[span.start : span.start + span.length] = own.long()
        # The last one stands for padding.
        return told[torch.where(flat_s == PADDING, width, flat_s)]

    def _record(self, line: Line, layer: int, chosen_sk: torch.Tensor) -> None:
        if line.batch is None:
            return
        flat_s = self._flat_of_rank(line)
        real_s = flat_s != PADDING
        width = line.batch.input_ids_BT.numel()
        on_line = torch.full((width, self.shape.top_k), _UNKNOWN, dtype=torch.int32)
        on_line[flat_s[real_s]] = chosen_sk.cpu().to(torch.int32)[real_s]
        for span in line.batch.spans:
            if span.row not in self._known:
                shape = (len(self._rows[span.row].tokens), self.shape.layers, self.shape.top_k)
                self._known[span.row] = torch.full(shape, _UNKNOWN, dtype=torch.int32)
            own = self._known[span.row][span.first : span.first + span.length, layer]
            found = on_line[span.start : span.start + span.length]
            own.copy_(torch.where(found == _UNKNOWN, own, found))

    def _count(self, told_sk: torch.Tensor, chosen_sk: torch.Tensor, own_sk: torch.Tensor) -> None:
        counts = told_sk[:, 0] != _UNKNOWN
        differs = (own_sk.sort(-1).values != chosen_sk.sort(-1).values).any(-1)
        self._counts = self._counts + torch.stack([(differs & counts).sum(), counts.sum()]).cpu()


class _Router:
    """What one layer's router asks; has the method of megatron-core's `RouterReplay`."""

    def __init__(self) -> None:
        self.told: torch.Tensor | None = None
        self.seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.queue: deque[torch.Tensor] = deque()
        """Choices of forwards whose layer is recomputed, in the order of backward passes."""

    def enter(self, told_sk: torch.Tensor) -> None:
        self.told = told_sk

    def leave(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What was told, what was chosen, and what the router would have chosen."""
        assert self.seen is not None
        self.told = None
        return self.seen

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers of the experts of each token, [s, top_k]."""
        if self.told is None:
            chosen = self.queue.popleft()
            return scores.gather(1, chosen), chosen
        assert default_compute_topk is not None
        _, own = default_compute_topk(scores, topk, num_groups, group_topk)
        chosen = torch.where(self.told == _UNKNOWN, own, self.told)
        self.seen = self.told, chosen, own
        # A forward that is to be recomputed runs without gradients.
        if not torch.is_grad_enabled():
            self.queue.append(chosen)
        return scores.gather(1, chosen), chosen


def _routers(chunk: Any) -> dict[int, _Router]:
    """By number of layer, from 0 in the whole model."""
    found = {}
    for layer in bare(chunk).decoder.layers:
        router = getattr(layer.mlp, "router", None)
        if router is not None:
            router.router_replay = found[layer.layer_number - 1] = _Router()
    return found
