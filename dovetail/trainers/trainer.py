"""One rollout's rows in, changed weights and metrics out.

    rows -> advantages (whole rollout) -> optimizer steps -> micro-batches -> gradient -> AdamW
              ^ old and reference logprobs of all rows, only where they are needed before a step

Old logprobs cost no pass of their own for the first optimizer step of a rollout: nothing has
changed yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dovetail.algorithms import table
from dovetail.algorithms.corrections import decoupled, importance_sampling
from dovetail.algorithms.losses.distillation import distillation_loss
from dovetail.algorithms.reduce import row_weights
from dovetail.batch.columns import mask_sums
from dovetail.batch.pack import MicroBatch, pack
from dovetail.batch.plan import Scope, optimizer_steps, rollout_ids
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import AlgorithmConfig
from dovetail.trainers.backend import Backend, BatchLoss, OnLogits, PerBatch, PerToken
from dovetail.trainers.critic import Critic
from dovetail.trainers.estimate import Estimator
from dovetail.trainers.hooks import TrainHooks
from dovetail.trainers.prepare import Prepared, Preparer
from dovetail.trainers.saved import SavedParts
from dovetail.trainers.scores import Scores, score_rows
from dovetail.trainers.step import TokenValues, merged, token_loss_of, train_step
from dovetail.trainers.sums import NUM_WORST, Sums, WorstToken, worst_tokens
from dovetail.trainers.torch.teacher import Teacher
from dovetail.trainers.whole import WholeStep
from dovetail.types.errors import ConfigError, TrainError


class Trainer:
    """Trains the policy of `backend`. On several ranks each one has a trainer, and all are called
    with the same rows.

    `samples_per_optimizer_step` counts rollouts: rows that one execution fanned out into count
    once. `critic`: of estimators that need one; in the first `num_critic_only_steps` rollouts it
    learns alone. `teacher`: of distillation. `loss_divisor`: tokens that a rollout's loss
    is divided by under the reduction constant, if the algorithm names none. `report(rows done, rows
    in all)` is called after every micro-batch.

    Raises:
        ConfigError: an algorithm that does not exist, KL without a reference, a schedule without an
        end.
    """

    def __init__(
        self,
        backend: Backend,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        pad_token_id: int,
        samples_per_optimizer_step: int,
        max_nonfinite_steps: int = 10,
        loss_divisor: int = 1,
        critic: Critic | None = None,
        num_critic_only_steps: int = 0,
        teacher: Teacher | None = None,
        report: Callable[[int, int], None] | None = None,
        hooks: TrainHooks | None = None,
    ):
        self.algorithm, self.pad_token_id = algorithm, pad_token_id
        self.samples_per_optimizer_step = samples_per_optimizer_step
        self.loss_divisor = algorithm.loss_divisor or loss_divisor
        self.critic, self.num_critic_only_steps = critic, num_critic_only_steps
        self.teacher = teacher
        self.max_nonfinite_steps = max_nonfinite_steps
        self.report = report or (lambda done, total: None)
        self.hooks = _completed(hooks or TrainHooks(), algorithm, temperature)
        own = self.hooks.loss or self.hooks.logits_loss
        self.loss: Any = own or table.load(table.LOSSES, algorithm.loss_type, "loss_type")
        in_sequences = algorithm.loss_type == "policy_loss" and algorithm.needs_sequences
        self.sees_batch = self.hooks.sees_batch or in_sequences
        self.needs_reference = _needs_reference(algorithm, backend)
        self.backend = backend
        self.prepare = Preparer(
            algorithm,
            self.hooks,
            Estimator(
                algorithm,
                values_of=None if critic is None else critic.values,
                teacher_of=None if teacher is None else teacher.logprobs,
            ),
            self._scores,
            needs_reference=self.needs_reference,
            scores_reference=backend.runs_ahead or backend.parallel.size > 1,
            device=backend.device,
        )
        self._saved = SavedParts(backend, critic)
        self.nonfinite_streak = 0
        self.changed = False
        """Whether the latest call of `train` has applied an optimizer step so far. While it has
        not, weights and optimizer are what they were before the call."""
        self.worst_tokens: list[WorstToken] = []
        """Where the latest call of `train` found trainer and engine furthest apart, worst first."""

    def train(self, rows: Sequence[TrainRow], rollout_id: int = 0) -> dict[str, float]:
        """Train on one rollout, in one or more optimizer steps. When it raises, no gradient is left
        over, and `changed` says whether any step was applied.

        Returns:
            `train/...` metrics, means over the optimizer steps; `train/skipped_steps`,
            `train/tokens` (trained tokens), `train/model_tokens` (tokens that the model saw,
            padding included) and `train/optimizer_steps` are sums.

        Raises:
            TrainError: `max_nonfinite_steps` steps in a row had a gradient that is not finite, of
                the policy or the critic; or a row lacks what is replayed.
        """
        self.changed, self.worst_tokens = False, []
        try:
            with self.backend.replaying(rows, rollout_id):
                return self._train(rows, rollout_id)
        except BaseException:
            self.backend.discard()
            if self.critic is not None:
                self.critic.discard()
            raise

    def _train(self, rows: Sequence[TrainRow], rollout_id: int) -> dict[str, float]:
        steps = optimizer_steps(rows, self.samples_per_optimizer_step)
        ready = self.prepare(rows, [i for step in steps[1:] for i in step], rollout_id)
        rollouts, divisors = rollout_ids(ready.rows), self._divisors(ready.rows)
        results: list[dict[str, float]] = []
        done = 0
        for number, chosen in enumerate(steps):
            weights = row_weights(
                [sum(ready.rows[i].loss_mask) for i in chosen],
                [rollouts[i] for i in chosen],
                self.algorithm.per_token,
                [divisors[i] for i in chosen],
            )
            step = _Step(
                dict(zip(chosen, weights, strict=True)),
                num_rollouts=len({rollouts[i] for i in chosen}),
                uses_old=number > 0 or ready.old_at_once,
                rows_before=done,
            )
            result = None
            if self.critic is None or rollout_id >= self.num_critic_only_steps:
                result = self._one_step(ready, step, divisors)
            learned = self._critic_step(ready, step)
            done += len(chosen)
            self.report(done, len(rows))
            if result is not None or learned:
                results.append({**(result or {}), **learned})
                self._count_nonfinite(results[-1])
        return {**merged(results), **ready.metrics}

    def _critic_step(self, ready: Prepared, step: _Step) -> dict[str, float]:
        if self.critic is None:
            return {}
        assert ready.values is not None and ready.returns is not None
        learned = self.critic.step(ready.rows, step.weight_of_row, ready.values, ready.returns)
        self.changed = self.changed or learned.get("train/critic_skipped_steps") == 0.0
        return learned

    def logprobs(self, rows: Sequence[TrainRow], reference: bool = False) -> list[list[float]]:
        """Logprobs of every response token of every row, under the sampling temperature."""
        with self.backend.replaying(rows):
            scores = self._scores(rows, range(len(rows)), scope=Scope.RESPONSE, reference=reference)
        return [scores[i].tolist() if i in scores else [] for i in range(len(rows))]

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that following steps depend on, of one rank alone. The tensors are the live
        ones."""
        tensors, facts = self._saved.state_dict()
        return tensors, {**facts, _STREAK: self.nonfinite_streak}

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Go on from a saved state, copying in place: following steps are bit-equal to those of the
        trainer that it was taken from.

        Raises:
            CheckpointError: the state belongs to another model.
            ConfigError: it is of a run without a critic, and this one has one.
        """
        self._saved.load_state_dict(tensors, facts)
        self.nonfinite_streak = int(facts[_STREAK])

    def save_into(self, directory: Path, *, in_background: bool = False) -> dict[str, Any]:
        """Write what following steps depend on into `directory`, which is empty and seen by all
        ranks; every rank calls it. `in_background`: as in `Backend.save`.

        Returns:
            Facts for `load_from`, the same on every rank.

        Raises:
            CheckpointError: a file can't be written, on whichever rank.
        """
        facts = self._saved.save_into(directory, in_background)
        return {**facts, _STREAK: self.nonfinite_streak}

    def has_saved(self) -> bool:
        """Whether `finish_save` has nothing to wait for on this rank."""
        return self._saved.has_saved()

    def finish_save(self) -> None:
        """See `Backend.finish_save`; every rank calls it."""
        self._saved.finish_save()

    def load_from(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """Go on from what `save_into` wrote, on any number of ranks and in any layout; every rank
        calls it.

        Raises:
            CheckpointError: the state is damaged, or belongs to another model or kind of backend.
            ConfigError: it is of a run without a critic, and this one has one.
        """
        self._saved.load_from(directory, facts)
        self.nonfinite_streak = int(facts[_STREAK])

    def offload(self) -> None:
        """Move all that lasts between steps to CPU memory until `onload`; see `Backend`."""
        for backend in self._saved.backends():
            backend.offload()

    def onload(self) -> None:
        """Undo `offload`."""
        for backend in self._saved.backends():
            backend.onload()

    def _one_step(
        self, ready: Prepared, step: _Step, divisors: Sequence[int]
    ) -> dict[str, float] | None:
        rows, scope = ready.rows, self._scope()
        planned = self.backend.plan(rows, list(step.weight_of_row), scope)
        if not planned:
            return None
        share = self.backend.parallel.share(planned)

        def batches() -> Iterator[MicroBatch]:
            # One micro-batch exists at a time.
            seen = step.rows_before
            for plan in share.mine:
                yield pack(rows, plan, self.pad_token_id, scope)
                seen += len(plan.rows)
                self.report(seen, len(rows))

        sums = Sums()
        loss = self._loss(ready, step, divisors, sums)
        result = train_step(self.backend, batches(), loss, sums, share.idle)
        found = worst_tokens(sums.mismatch, rows)
        self.worst_tokens = sorted(self.worst_tokens + found, key=lambda one: -one.gap)[:NUM_WORST]
        self.changed = self.changed or not result["train/skipped_steps"]
        result["train/tokens"] = float(sum(sum(rows[i].loss_mask) for i in step.weight_of_row))
        result["train/model_tokens"] = float(sum(plan.num_tokens for plan in planned))
        return result | self.backend.routing_metrics()

    def _scope(self) -> Scope:
        """Which tokens a training pass scores."""
        if self.hooks.logits_loss is not None:
            return Scope.SEQUENCE
        return Scope.RESPONSE if self.sees_batch else Scope.TRAINED

    def _divisors(self, rows: Sequence[TrainRow]) -> list[int]:
        """What the summed token losses of each row are divided by."""
        if self.algorithm.reduction == "constant":
            return [self.loss_divisor] * len(rows)
        return mask_sums(rows)

    def _loss(self, ready: Prepared, step: _Step, divisors: Sequence[int], sums: Sums) -> BatchLoss:
        """What the step's micro-batches add to its gradient."""

        def values(batch: MicroBatch) -> TokenValues:
            return self._values(ready, step, batch)

        if not self.sees_batch:
            return PerToken(
                lambda batch: token_loss_of(values(batch), self.loss, self.algorithm, sums)
            )
        trained = sum(sum(ready.rows[i].loss_mask) for i in step.weight_of_row)
        count = trained if self.algorithm.per_token else step.num_rollouts
        scale = 1.0 / count if count else 0.0
        look = None if self.teacher is None else self.teacher.logits
        whole = WholeStep(ready, divisors, scale, self.algorithm, self.hooks, values, sums, look)
        if self.hooks.logits_loss is not None:
            return OnLogits(whole.logits_loss_of)
        return PerBatch(whole.loss_of)

    def _values(self, ready: Prepared, step: _Step, batch: MicroBatch) -> TokenValues:
        rows = [ready.rows[i] for i in batch.rows]
        ref_N = _flat(batch, ready.ref)
        if ref_N is None and self.needs_reference:
            (ref_N,) = self.backend.logprobs([batch], reference=True)
        return TokenValues(
            weights_N=batch.per_row([step.weight_of_row[i] for i in batch.rows]),
            advantages_N=batch.flat([ready.advantages[i] for i in batch.rows]),
            rollout_logprobs_N=batch.flat(
                [
                    torch.full((row.response_length,), torch.nan)
                    if row.rollout_logprobs is None
                    else row.rollout_logprobs
                    for row in rows
                ]
            ),
            places_N=batch.places(),
            old_logprobs_N=_flat(batch, ready.old) if step.uses_old else None,
            ref_logprobs_N=ref_N,
        )

    def _scores(
        self,
        rows: Sequence[TrainRow],
        chosen: Sequence[int],
        scope: Scope = Scope.TRAINED,
        reference: bool = False,
    ) -> Scores:
        return score_rows(
            rows,
            chosen,
            scope,
            self.backend.plan,
            partial(self.backend.logprobs, reference=reference),
            self.pad_token_id,
            self.backend.parallel,
        )

    def _count_nonfinite(self, result: dict[str, float]) -> None:
        skipped = next((own for name, own in _SKIPPED.items() if result.get(name)), None)
        if skipped is None:
            self.nonfinite_streak = 0
            return
        norm, cure = skipped
        self.nonfinite_streak += 1
        if self.nonfinite_streak >= self.max_nonfinite_steps:
            raise TrainError(
                f"{self.nonfinite_streak} optimizer steps in a row had a gradient that is not "
                f"finite (last norm: {result[norm]}, {norm}); weights are those before them. "
                f"Lower {cure}, look at the rewards and samples of the last "
                "step, or raise --max-nonfinite-steps (TOML: optimizer.max_nonfinite_steps)"
            )


@dataclass(frozen=True, slots=True)
class _Step:
    """One optimizer step of a rollout."""

    weight_of_row: dict[int, float]
    """Of each trained token of the row in the loss."""
    num_rollouts: int
    uses_old: bool
    """False: the current logprobs are the old ones."""
    rows_before: int


def _needs_reference(algorithm: AlgorithmConfig, backend: Backend) -> bool:
    if algorithm.needs_reference and not backend.has_reference:
        raise ConfigError(
            "use_kl_loss or kl_coef asks for KL to a frozen reference, but there is none; set "
            "--ref-load (TOML: model.ref_load), or drop --use-kl-loss and --kl-coef"
        )
    return algorithm.needs_reference


def _completed(hooks: TrainHooks, algorithm: AlgorithmConfig, temperature: float) -> TrainHooks:
    """With the built-in correction where one is asked for, and none where none is; and with a
    built-in loss on logits."""
    logits_loss = hooks.logits_loss
    if algorithm.loss_type == table.DISTILLATION_LOSS:
        logits_loss = partial(distillation_loss, config=algorithm, temperature=temperature)
    own = decoupled if algorithm.use_decoupled_loss else importance_sampling
    return dataclasses.replace(
        hooks,
        logits_loss=logits_loss,
        correction=(hooks.correction or own) if algorithm.corrects else None,
        args=algorithm if hooks.args is None else hooks.args,
    )


def _flat(batch: MicroBatch, scores: Scores) -> torch.Tensor | None:
    return batch.flat([scores[i] for i in batch.rows]) if scores else None


_STREAK = "nonfinite_streak"
_SKIPPED = {
    "train/skipped_steps": ("train/grad_norm", "--lr (TOML: optimizer.lr)"),
    "train/critic_skipped_steps": (
        "train/critic_grad_norm",
        "--critic-lr (TOML: critic.critic_lr)",
    ),
}
"""Metrics of steps that were not applied: why, and the cure."""
