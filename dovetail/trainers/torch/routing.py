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
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dovetail.batch.pack import MicroBatch
from dovetail.batch.rows import TrainRow
from dovetail.engines.routing import Routers, find_routers
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.types.errors import ConfigError, TrainError

_UNKNOWN = -1


def make_replay(model: Any, leaf: str) -> RoutingReplay:
    """The replay that this setting asks for.

    Raises:
        ConfigError: the model has no routers that can be told what to choose.
    """
    routers, reason = find_routers(model)
    if routers is None:
        raise ConfigError(
            f"{leaf} can't be: {reason}; leave --{leaf.replace('_', '-')} (TOML: algorithm.{leaf}) "
            "out"
        )
    return RoutingReplay(routers, from_rollout=leaf == "use_rollout_routing_replay")


class RoutingReplay:
    """The records of one rollout's rows, and their replay in a policy's forwards.

    Args:
        routers: the policy's.
        from_rollout: replay what rows bring (R3); otherwise record in passes without gradient (R2).
    """

    def __init__(self, routers: Routers, *, from_rollout: bool) -> None:
        self.routers, self.from_rollout = routers, from_rollout
        self._rows: Sequence[TrainRow] = ()
        self._known: dict[int, torch.Tensor] = {}
        """[tokens of the row, L, top_k] int32, -1 where nothing is recorded."""
        self._replaced, self._replayed = torch.zeros(()), torch.zeros(())

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
                    self._known[i] = torch.from_numpy(
                        routed_by_rollout(
                            row,
                            len(self.routers),
                            self.routers.top_k,
                            self.routers.num_experts,
                        )
                    )
        try:
            yield
        finally:
            self._rows, self._known = (), {}

    def same_prompt(self, row: int) -> Hashable:
        """Equal for rows whose prompts go to the same experts, as far as that is recorded."""
        if row not in self._known:
            return None
        of_prompt = self._known[row][: self._rows[row].prompt_length]
        return hashlib.blake2b(of_prompt.contiguous().numpy().tobytes()).digest()

    @contextlib.contextmanager
    def around(self, batch: MicroBatch, device: torch.device) -> Iterator[None]:
        """What forward and backward of this batch must run inside.

        A token without a record goes where its router sends it, and there again when its layer is
        recomputed.
        """
        told_LTk = self._told(batch).to(device)
        counts = told_LTk[0, :, 0] != _UNKNOWN

        def choose(layer: int, own_Tk: torch.Tensor) -> torch.Tensor:
            chosen = torch.where(told_LTk[layer] == _UNKNOWN, own_Tk, told_LTk[layer])
            if torch.is_grad_enabled():
                self._count(own_Tk, chosen, counts)
            told_LTk[layer] = chosen
            return chosen

        with self.routers.choosing(choose):
            yield
        if not self.from_rollout and not torch.is_grad_enabled():
            self._record(batch, told_LTk)

    def share(self, parallel: DataParallel) -> None:
        """Every rank learns what the others have recorded in a pass without gradients."""
        if self.from_rollout or parallel.group is None or not self._rows:
            return
        lengths = [len(row.tokens) for row in self._rows]
        shape = (sum(lengths), len(self.routers), self.routers.top_k)
        every = torch.full(shape, _UNKNOWN, dtype=torch.int32)
        for i, part in enumerate(every.split(lengths)):
            if i in self._known:
                part.copy_(self._known[i])
        for i, part in enumerate(parallel.known(every.to(parallel.device)).cpu().split(lengths)):
            if bool((part != _UNKNOWN).any()):
                self._known[i] = part

    def take_metrics(self, parallel: DataParallel = ALONE) -> dict[str, float]:
        """`train/routing_replaced`: the share of replayed choices (a token in a layer) in passes
        with gradient on all ranks since the last call in which the router would have taken other
        experts."""
        counts = torch.stack([self._replaced, self._replayed]).to(parallel.device, torch.float64)
        replaced, replayed = parallel.summed(counts).tolist()
        self._replaced, self._replayed = torch.zeros(()), torch.zeros(())
        return {"train/routing_replaced": replaced / replayed} if replayed else {}

    def _count(self, own_Tk: torch.Tensor, chosen_Tk: torch.Tensor, counts: torch.Tensor) -> None:
        differs = (own_Tk.sort(-1).values != chosen_Tk.sort(-1).values).any(-1)
        self._replaced = self._replaced.to(counts.device) + (differs & counts).sum()
        self._replayed = self._replayed.to(counts.device) + counts.sum()

    def _told(self, batch: MicroBatch) -> torch.Tensor:
        """[L, T, top_k] int64, -1 where nothing is recorded."""
        places = batch.input_ids_BT.numel()
        told = torch.full((places, len(self.routers), self.routers.top_k), _UNKNOWN)
        for span in batch.spans:
            known = self._known.get(span.row)
            if known is not None:
                own = known[span.first : span.first + span.length]
                told[span.start : span.start + span.length] = own.long()
        return told.transpose(0, 1).contiguous()

    def _record(self, batch: MicroBatch, told_LTk: torch.Tensor) -> None:
        told = told_LTk.transpose(0, 1).to("cpu", torch.int32)
        for span in batch.spans:
            if span.row not in self._known:
                shape = (len(self._rows[span.row].tokens), *told.shape[1:])
                self._known[span.row] = torch.full(shape, _UNKNOWN, dtype=torch.int32)
            own = self._known[span.row][span.first : span.first + span.length]
            own.copy_(told[span.start : span.start + span.length])


def routed_by_rollout(
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
    return np.concatenate([routed, np.full_like(routed[:1], _UNKNOWN)]).astype(np.int32)
