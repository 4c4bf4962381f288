"""Which rows make a micro-batch, in a form that every way of splitting can take: packed lines
without shared prompts."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.batch.media import by_layout
from dovetail.batch.plan import PlannedBatch, Scope, plan_packed, used_length
from dovetail.batch.rows import TrainRow, check_ids
from dovetail.config.sections import BatchConfig
from dovetail.trainers.megatron.parallel import Ranks
from dovetail.trainers.torch.layout import LOGIT_ELEMENTS
from dovetail.types.errors import TrainError


def plan_lines(
    rows: Sequence[TrainRow],
    chosen: Sequence[int],
    scope: Scope,
    config: BatchConfig,
    ranks: Ranks,
    vocab_size: int,
) -> list[PlannedBatch]:
    """Micro-batches for all ranks: for each that sees other rows as many as the pipeline has
    stages, if there are rows enough.

    Raises:
        TrainError: a row has images, or a token id that the model does not.
    """
    text, *pictured = by_layout(rows, chosen)
    if pictured:
        raise TrainError(
            f"sample {rows[pictured[0][0]].index} has images, which the Megatron backend does not "
            "train on; use --train-backend torch (TOML: trainer.train_backend)"
        )
    check_ids([rows[i] for i in text], vocab_size)
    longest = max((used_length(rows[i], scope) for i in text), default=0)
    # Each context-parallel rank has its part of a line.
    budget = config.max_tokens_per_gpu * ranks.cp_size
    if scope is Scope.SEQUENCE:
        budget = min(budget, max(LOGIT_ELEMENTS // vocab_size, longest))

    def planned(budget: int) -> list[PlannedBatch]:
        return plan_packed(rows, text, budget, config.micro_batch_size, share=False, scope=scope)

    found = planned(budget)
    size, tokens = ranks.data.size, sum(plan.num_tokens for plan in found)
    rounds = max(-(-len(found) // size), ranks.pp_size)
    if len(found) == rounds * size or not found:
        return found
    return planned(max(longest, min(budget, -(-tokens // (rounds * size)))))
