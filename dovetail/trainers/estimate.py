"""From rewards to advantages, with the row of the table that the run asks for and all that it
reads: group ids, KL, a critic's values, a teacher's logprobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dovetail.algorithms import table
from dovetail.algorithms.inputs import Advantages, RewardBatch
from dovetail.algorithms.reduce import whiten
from dovetail.batch.plan import rollout_ids
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import AlgorithmConfig
from dovetail.types.errors import TrainError

Tensors = list[torch.Tensor]
PerToken = Callable[[Sequence[TrainRow]], Tensors]
"""`rows -> one [response_length] float32 tensor each`."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a rollout's tokens beside its rows, a [response_length] tensor per row."""

    kl: Tensors | None = None
    logprobs: Tensors | None = None
    """The policy's, before its first step on the rollout."""
    values: Tensors | None = None
    teacher: Tensors | None = None


class Estimator:
    """The advantages of a rollout.

    Args:
        values_of: the critic's; for rows of the table that need values.
        teacher_of: the teacher's logprobs; rows that bring `teacher_log_probs` or
            `opd_reverse_kl` are not asked for.

    Raises:
        ConfigError: no such estimator.
    """

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        *,
        values_of: PerToken | None = None,
        teacher_of: PerToken | None = None,
    ):
        name = algorithm.advantage_estimator
        self.algorithm, self.values_of, self.teacher_of = algorithm, values_of, teacher_of
        self.estimate = table.load(table.ADVANTAGES, name, "advantage_estimator")
        self.row = table.ADVANTAGES[name]
        asked = algorithm.normalize_advantages
        self.whitens = self.row.whitens if asked is None else asked
        self.distils = "teacher_logprobs" not in self.row.needs and algorithm.use_opd
        """Whether the teacher is a penalty on another estimator's advantages."""
        self.needs_teacher = algorithm.use_opd or "teacher_logprobs" in self.row.needs
        self.needs_logprobs = self.needs_teacher

    def values(self, rows: Sequence[TrainRow]) -> Tensors | None:
        """The critic's, where the estimator reads them."""
        if "values" not in self.row.needs:
            return None
        assert self.values_of is not None, "a run with this estimator has a critic"
        return self.values_of(rows)

    def teacher(self, rows: Sequence[TrainRow], logprobs: Tensors | None) -> Tensors | None:
        """The teacher's logprobs, where they are needed: the rows' own, or what `opd_reverse_kl`
        (log p - log p_teacher) says of the policy's `logprobs`, else the teacher's; 0 of rows that
        train nothing.

        Raises:
            TrainError: a row that trains has none, and there is no teacher to ask.
        """
        if not self.needs_teacher:
            return None
        assert logprobs is not None, "where a teacher is needed, the policy is scored"
        own = [_brought(row, one) for row, one in zip(rows, logprobs, strict=True)]
        missing = [i for i, row in enumerate(rows) if own[i] is None and any(row.loss_mask)]
        asked: Tensors = []
        if missing:
            if self.teacher_of is None:
                raise TrainError(
                    f"sample {rows[missing[0]].index}: teacher_log_probs is unknown, and there is "
                    "no teacher to ask; give one with --opd-teacher-load (TOML: "
                    "distillation.opd_teacher_load) or --opd-teacher-urls (TOML: "
                    "distillation.opd_teacher_urls), or set Sample.teacher_log_probs, one per "
                    "response token, in a reward, post-processing or generate function"
                )
            asked = self.teacher_of([rows[i] for i in missing])
        found = dict(zip(missing, asked, strict=True))
        nothing = [torch.zeros(row.response_length) for row in rows]
        return [
            found.get(i, nothing[i]) if values is None else values for i, values in enumerate(own)
        ]

    def __call__(self, rows: Sequence[TrainRow], known: Known) -> Advantages:
        """Advantages, and returns where there is a critic.

        Raises:
            TrainError: a row has no group where one is needed.
        """
        masks = [torch.tensor(row.loss_mask) for row in rows]
        batch = RewardBatch(
            rewards_S=torch.tensor([row.reward for row in rows], dtype=torch.float64),
            groups_S=[row.group_index for row in rows],
            rollouts_S=rollout_ids(rows),
            in_baseline_S=[row.in_baseline for row in rows],
            final_S=[row.reward_is_final for row in rows],
            masks=masks,
            kl=_chosen(known.kl, masks) if known.kl and self.algorithm.kl_coef else None,
            values=known.values and _chosen(known.values, masks),
            logprobs=known.logprobs and _chosen(known.logprobs, masks),
            teacher_logprobs=known.teacher and _chosen(known.teacher, masks),
        )
        found = self.estimate(batch, self.algorithm)
        if isinstance(found, Advantages):
            return found
        return Advantages([found[i].expand(len(mask)) for i, mask in enumerate(masks)])

    def finished(self, rows: Sequence[TrainRow], advantages: Tensors, known: Known) -> Tensors:
        """After the estimator or the user's function: the teacher's penalty, then whitening."""
        if self.distils:
            assert known.logprobs is not None and known.teacher is not None
            both = zip(known.logprobs, known.teacher, strict=True)
            apart = [own - teacher for own, teacher in both]
            apart = _chosen(apart, [torch.tensor(row.loss_mask) for row in rows])
            advantages = [
                value - self.algorithm.opd_kl_coef * gap
                for value, gap in zip(advantages, apart, strict=True)
            ]
        if not self.whitens or not rows:
            return advantages
        masks = torch.tensor([entry for row in rows for entry in row.loss_mask])
        lengths = [row.response_length for row in rows]
        return list(whiten(torch.cat(advantages), masks).split(lengths))


def _chosen(columns: Tensors, masks: Tensors) -> Tensors:
    """0 at observed tokens: whatever is said of them says nothing about the policy."""
    return [torch.where(mask > 0, column, 0.0) for column, mask in zip(columns, masks, strict=True)]


def _brought(row: TrainRow, logprobs: torch.Tensor) -> torch.Tensor | None:
    teacher, apart = (_aligned(row, name) for name in ("teacher_log_probs", "opd_reverse_kl"))
    return logprobs - apart if teacher is None and apart is not None else teacher


def _aligned(row: TrainRow, name: str) -> torch.Tensor | None:
    if row.extra.get(name) is None:
        return None
    values = torch.as_tensor(row.extra[name], dtype=torch.float32)
    if values.shape != (row.response_length,):
        raise TrainError(
            f"sample {row.index}: {name} has the shape {list(values.shape)}, expected "
            f"[{row.response_length}], the response_length"
        )
    return values
