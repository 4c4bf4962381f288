"""A frozen model that says how probable it finds the policy's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from dovetail.batch.pack import MicroBatch
from dovetail.batch.plan import PlannedBatch, Scope
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import BatchConfig
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.scores import score_rows
from dovetail.trainers.torch.backend import idle_pass, logprobs_of
from dovetail.trainers.torch.layout import plan_for
from dovetail.trainers.torch.placement import Placed, placed
from dovetail.trainers.torch.scored_model import ScoredModel


class Teacher:
    """Wraps `model`, whose vocabulary has the policy's tokens under the same ids. The temperature
    is the policy's, so that equal models agree."""

    def __init__(
        self,
        model: Any | Placed,
        batch: BatchConfig,
        *,
        temperature: float,
        pad_token_id: int,
        parallel: DataParallel = ALONE,
    ):
        own = placed(model, parallel)
        self.scored, self.batch_config, self.parallel = ScoredModel(own), batch, own.parallel
        self.temperature, self.pad_token_id = temperature, pad_token_id

    def logprobs(self, rows: Sequence[TrainRow]) -> list[torch.Tensor]:
        """Of every trained token; 0 at the others. [response_length] float32 per row."""
        everything = range(len(rows))
        scores = score_rows(
            rows,
            everything,
            Scope.TRAINED,
            self._plan,
            self._logprobs,
            self.pad_token_id,
            self.parallel,
        )
        return [scores[i] for i in everything]

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """At the scored tokens, [N, V] float32, untempered; tokens that only the teacher knows are
        left out by whoever compares."""
        self.scored.eval_mode()
        with self.scored.attention_for(batch):
            logits_NV = self.scored.logits(batch)
        self.scored.placed.passed()
        return logits_NV

    def _plan(
        self, rows: Sequence[TrainRow], chosen: Sequence[int], scope: Scope
    ) -> list[PlannedBatch]:
        return plan_for(
            [self.scored], self.batch_config, rows, chosen, scope, ranks=self.parallel.size
        )

    def _logprobs(self, batches: Iterable[MicroBatch], idle: int) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield logprobs_of(self.scored, batch, self.temperature)
        for _ in range(idle):
            idle_pass(self.scored)
