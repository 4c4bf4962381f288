"""Replay of expert choices in the forwards of transformers models; what is replayed and why is said
in `dovetail.trainers.routing`.

Shapes: T flat positions of a micro-batch (padding included), L mixture-of-experts layers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch

from dovetail.batch.pack import MicroBatch
from dovetail.engines.routing import Routers, find_routers
from dovetail.trainers.routing import UNKNOWN, RoutingRecords
from dovetail.types.errors import ConfigError


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


class RoutingReplay(RoutingRecords):
    """The records of one rollout's rows, and their replay in a policy's forwards.

    Args:
        routers: the policy's.
        from_rollout: see `RoutingRecords`.
    """

    def __init__(self, routers: Routers, *, from_rollout: bool) -> None:
        super().__init__(
            len(routers), routers.top_k, routers.num_experts, from_rollout=from_rollout
        )
        self.routers = routers

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
        told_TLk = self._told(batch.spans, batch.input_ids_BT.numel())
        told_LTk = told_TLk.transpose(0, 1).contiguous().to(device)
        counts = told_LTk[0, :, 0] != UNKNOWN

        def choose(layer: int, own_Tk: torch.Tensor) -> torch.Tensor:
            chosen = torch.where(told_LTk[layer] == UNKNOWN, own_Tk, told_LTk[layer])
            if torch.is_grad_enabled():
                self._count(own_Tk, chosen, counts)
            told_LTk[layer] = chosen
            return chosen

        with self.routers.choosing(choose):
            yield
        if not self.from_rollout and not torch.is_grad_enabled():
            self._record(batch, told_LTk)

    def _record(self, batch: MicroBatch, told_LTk: torch.Tensor) -> None:
        told = told_LTk.transpose(0, 1).to("cpu", torch.int32)
        for span in batch.spans:
            self._record_of(span).copy_(told[span.start : span.start + span.length])
