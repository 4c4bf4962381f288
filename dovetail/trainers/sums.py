"""Metrics of an optimizer step, added up over its micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dovetail.batch.pack import PLACES_PER_ROW
from dovetail.batch.rows import TrainRow
from dovetail.trainers.data_parallel import DataParallel

NUM_WORST = 8
"""Tokens with the largest mismatch that are named."""


class Sums:
    """Adds metrics up over pieces, as tensors: reading a value would make a GPU wait."""

    def __init__(self) -> None:
        self.weighted: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self.weight = torch.zeros(())
        self.totals: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self.mismatch = Mismatch()

    def add(self, weights_n: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Weighted as in the loss."""
        self.weight = self.weight + weights_n.sum()
        for name, values_n in metrics.items():
            self.weighted[name] = self.weighted[name] + (weights_n * values_n.detach()).sum()

    def total(self, values: dict[str, torch.Tensor]) -> None:
        """Shares of what is a sum over micro-batches already."""
        for name, value in values.items():
            self.totals[name] = self.totals[name] + value.detach()

    def over(self, parallel: DataParallel) -> None:
        """Take in what the other ranks have added up."""
        if parallel.group is None:
            return
        _summed(self.weighted, parallel)
        _summed(self.totals, parallel)
        self.weight = parallel.summed(self.weight.double())
        self.mismatch.over(parallel)

    def result(self) -> dict[str, float]:
        """Means; the comparison with the engine only if any token was compared."""
        weight = float(self.weight)
        out = {f"train/{k}": float(v) / weight for k, v in self.weighted.items() if weight > 0}
        out.update({f"train/{name}": float(value) for name, value in self.totals.items()})
        return out | self.mismatch.result()


class Mismatch:
    """Trainer against engine, over the tokens whose engine logprob is known; every token alike.

    With `d = trainer logprob - engine logprob` and `r = exp(d)`, tokens drawn by the engine:

    - `rollout_logprob_abs_diff`, `rollout_logprob_max_diff`: mean and largest |d|
    - `rollout_kl`: mean of `r - 1 - d`, an estimate of KL(engine || trainer) (k3)
    - `rollout_kl_k1`: mean of `-d`, the plain estimate of the same
    - `rollout_chi2`: mean of `r^2`, less 1, an estimate of chi^2(trainer || engine)
    - `rollout_max_ratio`: the largest r
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        self.worst: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        """The largest |d| and whose they are."""

    def add(
        self, logprobs_n: torch.Tensor, rollout_logprobs_n: torch.Tensor, places_n: torch.Tensor
    ) -> None:
        """`places_n` names the tokens, see `MicroBatch.places`; an unknown engine logprob is
        NaN."""
        known_n = torch.isfinite(rollout_logprobs_n)
        d_n = torch.where(known_n, logprobs_n - rollout_logprobs_n, 0.0)
        gap_n, ratio_n = d_n.abs(), d_n.exp()
        self._sum("tokens", known_n.sum())
        self._sum("abs_diff", gap_n.sum())
        self._sum("kl", (ratio_n - 1 - d_n).sum())
        self._sum("k1", -d_n.sum())
        self._sum("chi2", torch.where(known_n, ratio_n.square() - 1, 0.0).sum())
        if not len(d_n):
            return
        self.sums["max_ratio"] = torch.maximum(self.sums["max_ratio"], ratio_n.max())
        gaps = torch.cat([self.worst[0].to(gap_n), gap_n])
        places = torch.cat([self.worst[1].to(gap_n.device).long(), places_n.to(gap_n.device)])
        largest = gaps.topk(min(NUM_WORST, len(gaps)))
        self.worst = largest.values, places[largest.indices]

    def _sum(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + value

    def over(self, parallel: DataParallel) -> None:
        """As `Sums.over`."""
        largest = float(self.sums.pop("max_ratio", torch.zeros(())))
        gaps, places = (part.tolist() for part in self.worst)
        told = parallel.told({"max_ratio": largest, "gaps": gaps, "places": places})
        _summed(self.sums, parallel)
        self.sums["max_ratio"] = torch.tensor(max(one["max_ratio"] for one in told))
        gaps_n = torch.tensor([gap for one in told for gap in one["gaps"]])
        places_n = torch.tensor([place for one in told for place in one["places"]])
        largest_n = gaps_n.topk(min(NUM_WORST, len(gaps_n)))
        self.worst = largest_n.values, places_n[largest_n.indices]

    def result(self) -> dict[str, float]:
        """Nothing if no token was compared."""
        tokens = float(self.sums["tokens"])
        if not tokens:
            return {}
        return {
            "train/rollout_logprob_abs_diff": float(self.sums["abs_diff"]) / tokens,
            "train/rollout_logprob_max_diff": float(self.worst[0].max()),
            "train/rollout_kl": float(self.sums["kl"]) / tokens,
            "train/rollout_kl_k1": float(self.sums["k1"]) / tokens,
            "train/rollout_chi2": float(self.sums["chi2"]) / tokens,
            "train/rollout_max_ratio": float(self.sums["max_ratio"]),
        }


def _summed(sums: dict[str, torch.Tensor], parallel: DataParallel) -> None:
    """Over all ranks; one that saw no token knows no names."""
    told = parallel.told(sorted(sums))
    names = sorted({name for one in told for name in one})
    if names:
        own = [sums[name].double() if name in sums else torch.zeros(()).double() for name in names]
        values = parallel.summed(torch.stack(own))
        sums.update(zip(names, values, strict=True))


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A token that trainer and engine disagree on."""

    index: int | None
    """Of its sample."""
    position: int
    """In the response."""
    token_id: int
    rollout_logprob: float
    gap: float
    """|trainer logprob - engine logprob|."""


def worst_tokens(mismatch: Mismatch, rows: Sequence[TrainRow]) -> list[WorstToken]:
    """The tokens with the largest mismatch, the worst first; none that agree."""
    found = []
    for gap, place in zip(*(part.tolist() for part in mismatch.worst), strict=True):
        row, position = rows[int(place) // PLACES_PER_ROW], int(place) % PLACES_PER_ROW
        if gap > 0 and row.rollout_logprobs is not None:
            token_id = row.tokens[row.prompt_length + position]
            logprob = row.rollout_logprobs[position]
            found.append(WorstToken(row.index, position, token_id, logprob, gap))
    return found
