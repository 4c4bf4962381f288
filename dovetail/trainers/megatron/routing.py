"""Replay of expert choices in Megatron's routers; what is replayed and why is said in
`dovetail.trainers.routing`.

A router asks an object of megatron-core's for the experts of its tokens
(`megatron.core.transformer.moe.router_replay`). Ours knows which micro-batch passes: under a
pipeline several do at once, and a layer that is recomputed in a backward pass asks again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dovetail.trainers.megatron.line import PADDING, Line
from dovetail.trainers.megatron.parallel import Ranks
from dovetail.trainers.megatron.provider import bare
from dovetail.trainers.routing import UNKNOWN, RoutingRecords


class Replay(RoutingRecords):
    """The records of one rollout's rows on all ranks, and their replay.

    Args:
        from_rollout: see `RoutingRecords`.
    """

    def __init__(self, chunks: Sequence[Any], ranks: Ranks, *, from_rollout: bool):
        own = bare(chunks[0]).config
        super().__init__(
            own.num_layers, own.moe_router_topk, own.num_moe_experts, from_rollout=from_rollout
        )
        self.ranks, self.splits_sequence = ranks, own.sequence_parallel
        self.routers = {id(chunk): _routers(chunk) for chunk in chunks}

    def begin(self) -> None:
        """A pass starts."""
        for routers in self.routers.values():
            for router in routers.values():
                router.queue.clear()

    def enter(self, chunk: Any, line: Line) -> None:
        """The chunk's forward over this line starts."""
        told = self._told_on(line)
        for layer, router in self.routers[id(chunk)].items():
            router.enter(told[:, layer].to(self.ranks.device))

    def leave(self, chunk: Any, line: Line, *, records: bool) -> None:
        """It has ended."""
        for layer, router in self.routers[id(chunk)].items():
            told, chosen, own = router.leave()
            if records and not self.from_rollout:
                self._record(line, layer, chosen)
            elif not records:
                self._count(own, chosen, told[:, 0] != UNKNOWN)

    def _flat_of_rank(self, line: Line) -> torch.Tensor:
        """Flat positions of the tokens that this rank's routers see."""
        if not self.splits_sequence:
            return line.flat_S
        return line.flat_S.chunk(self.ranks.tp_size)[self.ranks.tp]

    def _told_on(self, line: Line) -> torch.Tensor:
        """[tokens, L, top_k] int64, -1 where nothing is recorded."""
        flat_s = self._flat_of_rank(line)
        width = 1 if line.batch is None else line.batch.input_ids_BT.numel()
        spans = () if line.batch is None else line.batch.spans
        told = self._told(spans, width + 1)
        # The last one stands for padding.
        return told[torch.where(flat_s == PADDING, width, flat_s)]

    def _record(self, line: Line, layer: int, chosen_sk: torch.Tensor) -> None:
        if line.batch is None:
            return
        flat_s = self._flat_of_rank(line)
        real_s = flat_s != PADDING
        width = line.batch.input_ids_BT.numel()
        on_line = torch.full((width, self.top_k), UNKNOWN, dtype=torch.int32)
        on_line[flat_s[real_s]] = chosen_sk.cpu().to(torch.int32)[real_s]
        for span in line.batch.spans:
            own = self._record_of(span)[:, layer]
            found = on_line[span.start : span.start + span.length]
            own.copy_(torch.where(found == UNKNOWN, own, found))


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
        chosen = torch.where(self.told == UNKNOWN, own, self.told)
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
