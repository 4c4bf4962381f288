"""What is fixed before the first optimizer step of a rollout: logprobs, advantages, and what the
user's functions made of them.

Shapes: S rows; every list has one entry per row, per-token ones are [response_length].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dovetail.algorithms.inputs import Advantages
from dovetail.algorithms.kl import kl_estimate
from dovetail.batch.columns import EDITABLE, columns_of, edited_rows, per_token
from dovetail.batch.convert import CONVERSION, Columns, hook_fault
from dovetail.batch.marks import remarked_rows, sample_marks
from dovetail.batch.plan import Scope
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import AlgorithmConfig
from dovetail.trainers.estimate import Estimator, Known
from dovetail.trainers.hooks import ADVANTAGE, POSTPROCESS, TrainHooks
from dovetail.trainers.scores import Scores
from dovetail.types.errors import TrainError
from dovetail.types.sample import Sample

Score = Callable[[Sequence[TrainRow], Sequence[int], Scope, bool], Scores]
"""`(rows, which of them, scope, reference) -> logprobs`."""


@dataclass(slots=True)
class Prepared:
    """One rollout, ready to be trained on."""

    rows: list[TrainRow]
    advantages: list[torch.Tensor]
    returns: list[torch.Tensor] | None = None
    """What a critic learns."""
    values: list[torch.Tensor] | None = None
    """What the critic expected before it learned from this rollout."""
    old: Scores = field(default_factory=dict)
    """The policy before the first step, where it was scored; the engine's own logprobs under
    use_rollout_logprobs."""
    ref: Scores = field(default_factory=dict)
    old_at_once: bool = False
    """`old` is for the first step too; otherwise nothing has changed yet then, and the current
    logprobs are the old ones."""
    columns: Columns = field(default_factory=dict)
    """What hooks see of it; empty where none looks."""
    metrics: dict[str, float] = field(default_factory=dict)

    def of_batch(self, positions: Sequence[int]) -> Columns:
        """The columns of some rows. What a hook put there for the rollout as a whole stays."""
        count = len(self.rows)
        return {
            name: [column[i] for i in positions]
            if isinstance(column, list | tuple) and len(column) == count
            else column
            for name, column in self.columns.items()
        }


class Preparer:
    """Scores, estimates and calls the hooks that see the whole rollout."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        hooks: TrainHooks,
        estimator: Estimator,
        score: Score,
        *,
        needs_reference: bool,
        scores_reference: bool,
        device: torch.device,
    ):
        self.algorithm, self.hooks, self.estimator, self.score = algorithm, hooks, estimator, score
        self.estimates = algorithm.estimates
        self.needs_reference, self.device = needs_reference, device
        self.scores_reference = scores_reference
        whole = hooks.sees_rollout or hooks.sees_batch
        self.scope = Scope.RESPONSE if whole else Scope.TRAINED
        self.wants_columns = hooks.sees_rollout or bool(hooks.loss or hooks.logits_loss)
        self.scores_all = hooks.sees_rollout or hooks.logits_loss is not None
        self.needs_policy = self.estimates and estimator.needs_logprobs

    def __call__(self, rows: Sequence[TrainRow], later: Sequence[int], rollout_id: int) -> Prepared:
        """`later`: positions of the rows that train after the first optimizer step.

        Raises:
            TrainError: engine logprobs are needed and a row has none; or there is a critic and a
                function made advantages without returns.
            HookRunError: a hook raised, or left something of a wrong shape.
        """
        ready = Prepared(list(rows), [])
        policy = self._score(ready, later)
        known = self._known(ready)
        self._estimate(ready, known)
        if self.wants_columns:
            ready.columns = self._columns(ready, policy, known)
        if self.hooks.advantage is not None and self.estimates:
            self._by_hook(ready, self.hooks.advantage)
        if ready.values is not None and ready.returns is None:
            raise TrainError(
                "the advantages of this rollout came from a function of yours, without the returns "
                "that the critic learns; have it set returns too, [response_length] per sample, or "
                "choose another --advantage-estimator (TOML: algorithm.advantage_estimator)"
            )
        if self.estimates:
            ready.advantages = self.estimator.finished(ready.rows, ready.advantages, known)
        if self.wants_columns and self.estimates:
            self._show_advantages(ready)
        if self.hooks.postprocess is not None:
            self._postprocess(ready, self.hooks.postprocess, rollout_id)
        return ready

    def _score(self, ready: Prepared, later: Sequence[int]) -> Scores:
        """Fill in old and reference logprobs; the trainer's own before the first step."""
        if not self.estimates:
            return {}
        rows, everything = ready.rows, range(len(ready.rows))
        in_reward = self.algorithm.kl_coef > 0
        from_engine = self.algorithm.use_rollout_logprobs
        policy: Scores = {}
        early = in_reward or self.needs_policy
        if self.scores_all or (early and not from_engine):
            policy = self.score(rows, everything, self.scope, False)
        elif later and not from_engine:
            policy = self.score(rows, later, self.scope, False)
        ready.old = engine_logprobs(rows, "use_rollout_logprobs") if from_engine else policy
        ready.old_at_once = from_engine or self.scores_all
        if in_reward or (self.needs_reference and (self.scores_all or self.scores_reference)):
            ready.ref = self.score(rows, everything, self.scope, True)
        return policy

    def _known(self, ready: Prepared) -> Known:
        if not self.estimates:
            return Known()
        everything = range(len(ready.rows))
        old = [ready.old[i] for i in everything] if len(ready.old) == len(ready.rows) else None
        kl = None
        if ready.ref and old is not None:
            kind = self.algorithm.kl_loss_type
            kl = [kl_estimate(ready.old[i], ready.ref[i], kind) for i in everything]
        ready.values = self.estimator.values(ready.rows)
        teacher = self.estimator.teacher(ready.rows, old)
        if teacher is not None and old is not None:
            ready.metrics["train/opd_reverse_kl"] = _mean_gap(ready.rows, old, teacher)
        return Known(kl, old, ready.values, teacher)

    def _estimate(self, ready: Prepared, known: Known) -> None:
        if not self.estimates or self.hooks.advantage is not None:
            ready.advantages = [torch.zeros(row.response_length) for row in ready.rows]
            return
        found = _converted(ready.rows) or self.estimator(ready.rows, known)
        ready.advantages, ready.returns = found.advantages, found.returns

    def _columns(self, ready: Prepared, policy: Scores, known: Known) -> Columns:
        columns = columns_of(ready.rows, self.device)
        for name, scores in (("log_probs", policy), ("ref_log_probs", ready.ref)):
            if len(scores) == len(ready.rows):
                columns[name] = self._placed([scores[i] for i in range(len(scores))])
        if self.estimates:
            none = [torch.zeros(row.response_length) for row in ready.rows]
            columns["kl"] = self._placed(none if known.kl is None else known.kl)
        for name, values in (("values", known.values), ("teacher_log_probs", known.teacher)):
            if values is not None:
                columns[name] = self._placed(values)
        return columns

    def _placed(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # A copy of each: a hook may write into it.
        return [value.to(self.device, copy=True) for value in values]

    def _by_hook(self, ready: Prepared, hook: Callable[[Columns], Any]) -> None:
        got = hook(ready.columns)
        if isinstance(got, Mapping):
            ready.columns.update(got)
        elif isinstance(got, tuple) and len(got) == 2:
            ready.columns["advantages"], ready.columns["returns"] = got
        elif got is not None:
            ready.columns["advantages"] = got
        if ready.columns.get("advantages") is None:
            raise hook_fault(
                ADVANTAGE,
                'the function set no data["advantages"]; expected a list with a tensor '
                "[response_length] per sample",
            )
        self._take_over(ADVANTAGE, ready, edited_rows(ADVANTAGE, ready.rows, ready.columns))

    def _show_advantages(self, ready: Prepared) -> None:
        ready.columns["advantages"] = self._placed(ready.advantages)
        returns = ready.columns.get("returns", ready.returns or ready.advantages)
        ready.columns["returns"] = self._placed(
            per_token(ADVANTAGE, "returns", ready.rows, returns)
        )

    def _postprocess(
        self,
        ready: Prepared,
        hook: Callable[[int, Columns, list[Sample]], Any],
        rollout_id: int,
    ) -> None:
        data = ready.columns
        before = [sample_marks(row.sample) for row in ready.rows]
        hook(rollout_id, data, [row.sample for row in ready.rows if row.sample is not None])
        rows = edited_rows(POSTPROCESS, ready.rows, data)
        self._take_over(POSTPROCESS, ready, remarked_rows(POSTPROCESS, rows, before))

    def _take_over(self, slot: str, ready: Prepared, rows: list[TrainRow]) -> None:
        """Whatever a hook changed in the columns is what training goes on with."""
        ready.rows, data = rows, ready.columns
        fresh = columns_of(rows, self.device)
        data.update({name: fresh[name] for name in EDITABLE if name in fresh})
        if not self.estimates:
            return

        def edited(name: str, known: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
            column = data.get(name)
            return known if column is None else per_token(slot, name, rows, column)

        ready.advantages = edited("advantages", None) or ready.advantages
        ready.returns = edited("returns", ready.returns)
        ready.values = edited("values", ready.values)
        ready.ref = dict(enumerate(edited("ref_log_probs", None) or [])) or ready.ref
        if self.algorithm.use_rollout_logprobs:
            ready.old = engine_logprobs(rows, "use_rollout_logprobs")
        else:
            ready.old = dict(enumerate(edited("log_probs", None) or [])) or ready.old


def _mean_gap(
    rows: Sequence[TrainRow], policy: list[torch.Tensor], teacher: list[torch.Tensor]
) -> float:
    """Mean of log p - log p_teacher over the trained tokens: the KL to the teacher, estimated."""
    masks = [torch.tensor(row.loss_mask) > 0 for row in rows]
    pairs = zip(policy, teacher, masks, strict=True)
    total = sum(float((own - its)[mask].sum()) for own, its, mask in pairs)
    return total / max(sum(int(mask.sum()) for mask in masks), 1)


def _converted(rows: Sequence[TrainRow]) -> Advantages | None:
    """What a conversion made; None: it made none.

    Raises:
        HookRunError: not every row has them, or they have another shape.
    """

    def column(name: str) -> list[torch.Tensor] | None:
        values = [row.extra.get(name) for row in rows]
        missing = all(value is None for value in values)
        return None if missing else per_token(CONVERSION, name, rows, values)

    advantages = column("advantages")
    return None if advantages is None else Advantages(advantages, column("returns"))


def engine_logprobs(rows: Sequence[TrainRow], wanted_by: str) -> Scores:
    """What the engine said when it sampled, of every row; 0 of rows that train nothing.

    Raises:
        TrainError: a row that trains has none.
    """
    for row in rows:
        if row.rollout_logprobs is None and any(row.loss_mask):
            raise TrainError(
                f"sample {row.index}: rollout_log_probs is unknown, but {wanted_by} needs the "
                "engine's logprobs of every response token; a generate function sets them with "
                "Sample.append_response_tokens(tokens=..., log_probs=...), a conversion in "
                f"rollout_log_probs; or leave --{wanted_by.replace('_', '-')} "
                f"(TOML: algorithm.{wanted_by}) out"
            )
    return {
        i: torch.tensor(row.rollout_logprobs or [0.0] * row.response_length, dtype=torch.float32)
        for i, row in enumerate(rows)
    }
