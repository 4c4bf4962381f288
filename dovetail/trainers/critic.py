"""The critic of PPO: what the rest of a response is expected to earn, learned beside the policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dovetail.algorithms.logprobs import TokenLoss
from dovetail.algorithms.losses.value import value_loss
from dovetail.batch.pack import MicroBatch, pack
from dovetail.batch.plan import Scope
from dovetail.batch.rows import TrainRow
from dovetail.checkpoint.hf import save_hf
from dovetail.checkpoint.hf_export import save_hf_tensors
from dovetail.config.sections import BatchConfig, OptimizerConfig
from dovetail.trainers.backend import PerToken
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.scores import score_rows
from dovetail.trainers.sums import Sums
from dovetail.trainers.torch.backend import TorchBackend, idle_pass
from dovetail.trainers.torch.placement import Placed, placed
from dovetail.trainers.torch.value_model import HEAD_FILE, add_value_head, without_head

Tensors = Sequence[torch.Tensor]


class Critic:
    """Trains `model` and a value head on it, in place, with an optimizer of its own.

    The value of a token is read where the token is predicted: before it is known.

    Args:
        optimizer: with the critic's own rate and warm-up.
        value_clip: how far a value may move from what it was at the start of the rollout's training
            before its loss stops falling; None: any way.
        head_from: a directory that may hold a trained value head.
    """

    def __init__(
        self,
        model: Any | Placed,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        *,
        value_clip: float | None,
        pad_token_id: int,
        total_optimizer_steps: int | None,
        head_from: str | None = None,
        parallel: DataParallel = ALONE,
    ):
        own = placed(model, parallel)
        add_value_head(own.model, head_from, own.device)
        self.model, self.value_clip, self.pad_token_id = own.model, value_clip, pad_token_id
        self.backend = TorchBackend(
            own,
            None,
            batch,
            optimizer,
            temperature=1.0,
            total_steps=total_optimizer_steps,
        )

    def values(self, rows: Sequence[TrainRow]) -> list[torch.Tensor]:
        """Of every trained token; 0 at the others. [response_length] float32 per row."""
        everything = range(len(rows))
        scores = score_rows(
            rows,
            everything,
            Scope.TRAINED,
            self.backend.plan,
            self._values,
            self.pad_token_id,
            self.backend.parallel,
        )
        return [scores[i] for i in everything]

    def step(
        self,
        rows: Sequence[TrainRow],
        weight_of_row: Mapping[int, float],
        old_values: Tensors,
        returns: Tensors,
    ) -> dict[str, float]:
        """One optimizer step on the chosen rows, whose trained tokens have these weights.

        Returns:
            `train/value_loss`, `train/value_clip_frac`, `train/value_mean`, `train/return_mean`
            (means under the weights), `train/explained_variance` (1 is perfect, 0 no better than
            the mean, over the tokens), `train/critic_grad_norm`, `train/critic_lr`,
            `train/critic_skipped_steps` (1.0 when the gradient was not finite). None of them
            without a trained token.
        """
        planned = self.backend.plan(rows, list(weight_of_row), Scope.TRAINED)
        if not planned:
            return {}
        sums, parallel = Sums(), self.backend.parallel
        share = parallel.share(planned)
        for plan in share.mine:
            batch = pack(rows, plan, self.pad_token_id, Scope.TRAINED)
            weights_N = batch.per_row([weight_of_row[i] for i in batch.rows])
            old_N = batch.flat([old_values[i] for i in batch.rows])
            returns_N = batch.flat([returns[i] for i in batch.rows])
            self._accumulate(batch, weights_N, old_N, returns_N, sums)
        self.backend.accumulate([], PerToken(_nothing), share.idle)
        outcome = self.backend.step()
        sums.over(parallel)
        return {
            **sums.result(),
            "train/explained_variance": explained_variance(
                rows, weight_of_row, old_values, returns
            ),
            "train/critic_grad_norm": outcome.grad_norm,
            "train/critic_lr": outcome.lr,
            "train/critic_skipped_steps": float(not outcome.applied),
        }

    def export(self, tokenizer: Any, path: Path | str) -> Path:
        """Write the critic as a Hugging Face directory with its value head beside the weights, for
        `head_from` of another one. All ranks of a sharded one call it, and rank 0 writes.

        Raises:
            ConfigError: something else is there.
            CheckpointError: it can't be written; an earlier export is as it was.
        """
        own = self.backend.policy.placed
        with without_head(self.model) as head:
            if not own.shards:
                return save_hf(self.model, tokenizer, path, {HEAD_FILE: head}, "critic_save")
            return save_hf_tensors(
                self.model,
                self.backend.hf_tensors(),
                tokenizer,
                path,
                writes=dist.get_rank() == 0,
                beside=lambda directory: save_file(head, directory / HEAD_FILE),
                leaf="critic_save",
            )

    def discard(self) -> None:
        """Forget a gradient that was not applied."""
        self.backend.discard()

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `Trainer.state_dict`."""
        return self.backend.state_dict()

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """As `Trainer.load_state_dict`."""
        self.backend.load_state_dict(tensors, facts)

    def save(self, directory: Path, *, in_background: bool = False) -> dict[str, Any]:
        """As `Backend.save`."""
        return self.backend.save(directory, in_background=in_background)

    def has_saved(self) -> bool:
        """As `Backend.has_saved`."""
        return self.backend.has_saved()

    def finish_save(self) -> None:
        """As `Backend.finish_save`."""
        self.backend.finish_save()

    def load(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """As `Backend.load`."""
        self.backend.load(directory, facts)

    def _predicted(self, batch: MicroBatch) -> torch.Tensor:
        values_N: torch.Tensor = self.model.value_head(self.backend.policy.hidden(batch).float())
        return values_N.squeeze(-1)

    @torch.no_grad()
    def _values(self, batches: Iterable[MicroBatch], idle: int) -> Iterator[torch.Tensor]:
        policy = self.backend.policy
        for batch in batches:
            policy.eval_mode()
            with policy.attention_for(batch):
                values_N = self._predicted(batch)
            policy.placed.passed()
            yield values_N
        for _ in range(idle):
            idle_pass(policy)

    def _accumulate(
        self,
        batch: MicroBatch,
        weights_N: torch.Tensor,
        old_N: torch.Tensor,
        returns_N: torch.Tensor,
        sums: Sums,
    ) -> None:
        policy = self.backend.policy
        policy.eval_mode()
        weights_N, old_N, returns_N = (
            values.to(policy.device) for values in (weights_N, old_N, returns_N)
        )
        with policy.attention_for(batch):
            values_N = self._predicted(batch)
            loss_N, clipped_N = value_loss(values_N, old_N, returns_N, self.value_clip)
            torch.autograd.backward((weights_N * loss_N).sum())
        self.backend.optimizer.collect()
        metrics = {
            "value_loss": loss_N,
            "value_clip_frac": clipped_N,
            "value_mean": values_N,
            "return_mean": returns_N,
        }
        sums.add(weights_N, metrics)


def _nothing(batch: MicroBatch) -> TokenLoss:
    raise AssertionError("there is no micro-batch in an idle round")


def explained_variance(
    rows: Sequence[TrainRow], chosen: Iterable[int], values: Tensors, returns: Tensors
) -> float:
    """How much of the returns of the chosen rows' trained tokens the values told beforehand."""
    masks = {i: torch.tensor(rows[i].loss_mask) > 0 for i in chosen}
    told = torch.cat([values[i][mask] for i, mask in masks.items()]).double()
    came = torch.cat([returns[i][mask] for i, mask in masks.items()]).double()
    spread = float(came.var(unbiased=False))
    return 1.0 - float((came - told).var(unbiased=False)) / spread if spread else 0.0
