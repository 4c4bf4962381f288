"""Micro-batches in the layout that suits the models that will see them."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.batch.media import by_layout
from dovetail.batch.plan import (
    PlannedBatch,
    Same,
    Scope,
    by_tokens,
    plan_packed,
    plan_padded,
    used_length,
)
from dovetail.batch.rows import TrainRow
from dovetail.config.sections import BatchConfig
from dovetail.trainers.torch.scored_model import ScoredModel
from dovetail.types.errors import TrainError

CPU_BUDGET = 4096
"""More tokens at once are no faster on a CPU: measured, 600 to 4,096 differ by 4 %."""
WORTH_PACKING = 0.95
"""Packed lines pay from this share of the padded tokens on: equal rows run faster as a batch."""
LOGIT_ELEMENTS = 256 * 1024 * 1024
"""Most logits of a micro-batch whose loss is on logits: 1 GB in float32, as much again for their
gradient."""


def plan_for(
    models: Sequence[ScoredModel],
    config: BatchConfig,
    rows: Sequence[TrainRow],
    chosen: Sequence[int],
    scope: Scope,
    same: Same | None = by_tokens,
    ranks: int = 1,
) -> list[PlannedBatch]:
    """Packed lines with shared prompts where all models can, padded lines otherwise; rows with
    images are always padded. Of a size that gives each of `ranks` about as much. `same`: which
    prompts are one; None: each row keeps its own.

    Raises:
        TrainError: a row has images and a model takes only text, or their tensors are lost.
    """
    text, *pictured = by_layout(rows, chosen)
    if pictured:
        _check_vision(models, rows[pictured[0][0]])
    budget, max_rows = config.max_tokens_per_gpu, config.micro_batch_size
    longest = max((used_length(rows[i], scope) for i in chosen), default=0)
    if models[0].device.type == "cpu":
        # A long prompt still needs room for several siblings beside it.
        budget = min(budget, max(CPU_BUDGET, 4 * longest))
    if scope is Scope.SEQUENCE:
        vocab = models[0].model.get_input_embeddings().weight.shape[0]
        budget = min(budget, max(LOGIT_ELEMENTS // vocab, longest))

    def laid_out(budget: int) -> list[PlannedBatch]:
        with_images = [
            plan
            for members in pictured
            for plan in plan_padded(rows, members, budget, max_rows, scope=scope)
        ]
        padded = plan_padded(rows, text, budget, max_rows, scope=scope)
        if not all(_packs(model, longest) for model in models):
            return padded + with_images
        packed = plan_packed(
            rows,
            text,
            budget,
            max_rows,
            share=same is not None,
            scope=scope,
            same=same or by_tokens,
        )
        shorter = packed if _tokens(packed) < WORTH_PACKING * _tokens(padded) else padded
        return shorter + with_images

    planned = laid_out(budget)
    if len(planned) % ranks == 0:
        return planned
    rounds = -(-len(planned) // ranks)
    return laid_out(max(longest, min(budget, -(-_tokens(planned) // (rounds * ranks)))))


def _check_vision(models: Sequence[ScoredModel], row: TrainRow) -> None:
    for model in models:
        if getattr(model.model.config, "vision_config", None) is None:
            raise TrainError(
                f"sample {row.index} has images, {type(model.model).__name__} takes only text; use "
                "a vision-language model: --hf-checkpoint (TOML: model.hf_checkpoint)"
            )


def _packs(model: ScoredModel, longest: int) -> bool:
    return model.packs and (model.longest_packed is None or longest <= model.longest_packed)


def _tokens(plans: Sequence[PlannedBatch]) -> int:
    return sum(plan.num_tokens for plan in plans)
