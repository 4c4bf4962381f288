"""One rollout's rows in, changed weights and metrics out.

    rows -> advantages (whole rollout) -> optimizer steps -> micro-batches -> gradient -> AdamW
              ^ old and reference logprobs of all rows, only where they are needed before a step

Old logprobs cost no pass of their own for the first optimizer step of a rollout: nothing has
changed yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dovetail.algorithms import table
from dovetail.algorithms.inputs import RewardBatch
from dovetail.algorithms.kl import kl_estimate
from dovetail.algorithms.reduce import row_weights, whiten
from dovetail.batch.pack import MicroBatch, pack
from dovetail.batch.plan import Scope, optimizer_steps, rollout_ids
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import AlgorithmConfig, BatchConfig, OptimizerConfig
from dovetail.trainers.step import TokenValues, train_step
from dovetail.trainers.torch.backend import TorchBackend
from dovetail.types.errors import ConfigError, TrainError

Scores = dict[int, torch.Tensor]
"""Row position -> [response_length] float32 logprobs, 0.0 where a token was not scored."""


class Trainer:
    """Trains `model` in place: its tensors are never replaced, so an engine may share them.

    `samples_per_optimizer_step` counts rollouts: rows that one execution fanned out into count
    once. `report(rows done, rows in all)` is called after every micro-batch.

    Raises:
        ConfigError: an algorithm that does not exist, KL without a reference, a schedule without an
        end.
    """

    def __init__(
        self,
        model: Any,
        reference_model: Any | None,
        algorithm: AlgorithmConfig,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        *,
        temperature: float,
        pad_token_id: int,
        total_optimizer_steps: int | None,
        samples_per_optimizer_step: int,
        report: Callable[[int, int], None] | None = None,
    ):
        self.algorithm, self.pad_token_id = algorithm, pad_token_id
        self.samples_per_optimizer_step = samples_per_optimizer_step
        self.max_nonfinite_steps = optimizer.max_nonfinite_steps
        self.report = report or (lambda done, total: None)
        self.loss = table.load(table.LOSSES, algorithm.loss_type, "loss_type")
        self.is_sft = algorithm.loss_type == "sft_loss"
        self.advantage = table.load(
            table.ADVANTAGES, algorithm.advantage_estimator, "advantage_estimator"
        )
        self.needs_reference = not self.is_sft and (algorithm.use_kl_loss or algorithm.kl_coef > 0)
        if self.needs_reference and reference_model is None:
            raise ConfigError(
                "use_kl_loss or kl_coef asks for KL to a frozen reference, but there is none; set "
                "--ref-load (TOML: model.ref_load), or drop --use-kl-loss and --kl-coef"
            )
        self.backend = TorchBackend(
            model,
            reference_model if self.needs_reference else None,
            batch,
            optimizer,
            temperature=temperature,
            total_steps=total_optimizer_steps,
        )
        self.nonfinite_streak = 0

    def train(self, rows: Sequence[TrainRow]) -> dict[str, float]:
        """Train on one rollout, in one or more optimizer steps.

        Returns:
            `train/...` metrics, means over the optimizer steps; `train/skipped_steps`,
            `train/tokens` (trained tokens), `train/model_tokens` (tokens that the model saw,
            padding included) and `train/optimizer_steps` are sums.

        Raises:
            TrainError: `max_nonfinite_steps` steps in a row had a gradient that is not finite.
        """
        steps = optimizer_steps(rows, self.samples_per_optimizer_step)
        old, ref = self._scores_before(rows, steps)
        advantages_S = self._advantages(rows, old, ref)
        rollouts = rollout_ids(rows)
        results: list[dict[str, float]] = []
        done = 0
        for number, chosen in enumerate(steps):
            weights = row_weights(
                [sum(rows[i].loss_mask) for i in chosen],
                [rollouts[i] for i in chosen],
                self.algorithm.calculate_per_token_loss,
            )
            result = self._one_step(
                rows,
                dict(zip(chosen, weights, strict=True)),
                advantages_S,
                old if number else {},
                ref,
                done,
            )
            done += len(chosen)
            self.report(done, len(rows))
            if result is not None:
                results.append(result)
                self._count_nonfinite(result)
        return _merged(results)

    def logprobs(self, rows: Sequence[TrainRow], reference: bool = False) -> list[list[float]]:
        """Logprobs of every response token of every row, under the sampling temperature."""
        scores = self._scores(rows, range(len(rows)), scope=Scope.RESPONSE, reference=reference)
        return [scores[i].tolist() if i in scores else [] for i in range(len(rows))]

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that following steps depend on. The tensors are the live ones."""
        tensors, facts = self.backend.state_dict()
        return tensors, {**facts, "nonfinite_streak": self.nonfinite_streak}

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Go on from a saved state, copying in place: following steps are bit-equal to those of the
        trainer that it was taken from.

        Raises:
            CheckpointError: the state belongs to another model.
        """
        self.backend.load_state_dict(tensors, facts)
        self.nonfinite_streak = int(facts["nonfinite_streak"])

    def _one_step(
        self,
        rows: Sequence[TrainRow],
        weight_of_row: dict[int, float],
        advantages_S: torch.Tensor,
        old: Scores,
        ref: Scores,
        rows_done: int,
    ) -> dict[str, float] | None:
        planned = self.backend.plan(rows, list(weight_of_row))
        if not planned:
            return None
        seen = rows_done

        def values(batch: MicroBatch) -> TokenValues:
            old_N, ref_N = _flat(batch, old), _flat(batch, ref)
            if ref_N is None and self.needs_reference:
                ref_N = self.backend.logprobs(batch, reference=True)
            unknown = [rows[i].rollout_logprobs for i in batch.rows]
            return TokenValues(
                weights_N=batch.per_row([weight_of_row[i] for i in batch.rows]),
                advantages_N=batch.per_row(advantages_S[list(batch.rows)]),
                rollout_logprobs_N=batch.flat(
                    [
                        torch.full((rows[i].response_length,), torch.nan)
                        if known is None
                        else known
                        for i, known in zip(batch.rows, unknown, strict=True)
                    ]
                ),
                old_logprobs_N=old_N,
                ref_logprobs_N=ref_N,
            )

        def on_batch(batch: MicroBatch) -> None:
            nonlocal seen
            seen += len(batch.rows)
            self.report(seen, len(rows))

        # One micro-batch exists at a time.
        batches = (pack(rows, plan, self.pad_token_id) for plan in planned)
        result = train_step(self.backend, batches, values, self.loss, self.algorithm, on_batch)
        result["train/tokens"] = float(sum(sum(rows[i].loss_mask) for i in weight_of_row))
        result["train/model_tokens"] = float(sum(plan.num_tokens for plan in planned))
        return result

    def _scores_before(
        self, rows: Sequence[TrainRow], steps: Sequence[Sequence[int]]
    ) -> tuple[Scores, Scores]:
        """Old and reference logprobs that must be known before the first step."""
        if self.is_sft:
            return {}, {}
        in_reward = self.algorithm.kl_coef > 0
        needed = range(len(rows)) if in_reward else [i for step in steps[1:] for i in step]
        old = self._scores(rows, needed) if needed else {}
        ref = self._scores(rows, needed, reference=True) if in_reward else {}
        return old, ref

    def _scores(
        self,
        rows: Sequence[TrainRow],
        chosen: Sequence[int],
        *,
        scope: Scope = Scope.TRAINED,
        reference: bool = False,
    ) -> Scores:
        scores = {i: torch.zeros(rows[i].response_length) for i in chosen}
        for plan in self.backend.plan(rows, list(chosen), scope):
            batch = pack(rows, plan, self.pad_token_id, scope)
            logprobs_N = self.backend.logprobs(batch, reference).cpu()
            counts = [len(scored) for scored in batch.scored]
            for i, where, part in zip(
                batch.rows, batch.scored, logprobs_N.split(counts), strict=True
            ):
                scores[i][where] = part
        return scores

    def _advantages(self, rows: Sequence[TrainRow], old: Scores, ref: Scores) -> torch.Tensor:
        if self.is_sft:
            return torch.zeros(len(rows))
        config = self.algorithm
        rewards = [row.reward for row in rows]
        if config.kl_coef > 0:
            for i, row in enumerate(rows):
                # Unscored tokens are 0.0 on both sides, and every estimator is 0 there.
                kl = kl_estimate(old[i], ref[i], config.kl_loss_type).sum()
                rewards[i] = row.reward - config.kl_coef * float(kl)
        advantages_S: torch.Tensor = self.advantage(
            RewardBatch(
                rewards_S=torch.tensor(rewards, dtype=torch.float64),
                groups_S=[row.group_index for row in rows],
                rollouts_S=rollout_ids(rows),
                in_baseline_S=[row.in_baseline for row in rows],
                final_S=[row.reward_is_final for row in rows],
            ),
            config,
        )
        if config.normalize_advantages:
            return whiten(advantages_S, torch.tensor([sum(row.loss_mask) for row in rows]))
        return advantages_S

    def _count_nonfinite(self, result: dict[str, float]) -> None:
        if not result["train/skipped_steps"]:
            self.nonfinite_streak = 0
            return
        self.nonfinite_streak += 1
        if self.nonfinite_streak >= self.max_nonfinite_steps:
            raise TrainError(
                f"{self.nonfinite_streak} optimizer steps in a row had a gradient that is not "
                f"finite (last norm: {result['train/grad_norm']}); weights are those before them. "
                "Lower --lr (TOML: optimizer.lr), look at the rewards and samples of the last "
                "step, or raise --max-nonfinite-steps (TOML: optimizer.max_nonfinite_steps)"
            )


def _flat(batch: MicroBatch, scores: Scores) -> torch.Tensor | None:
    return batch.flat([scores[i] for i in batch.rows]) if scores else None


_SUMS = ("train/skipped_steps", "train/tokens", "train/model_tokens")


def _merged(results: list[dict[str, float]]) -> dict[str, float]:
    names = {name: None for result in results for name in result}
    merged: dict[str, float] = {"train/skipped_steps": 0.0, "train/tokens": 0.0}
    for name in names:
        values = [result[name] for result in results if name in result]
        merged[name] = sum(values) if name in _SUMS else sum(values) / len(values)
    merged["train/optimizer_steps"] = len(results) - merged["train/skipped_steps"]
    return merged
