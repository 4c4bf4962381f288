"""`rollout.sft_rollout`: takes conversations from the data source as finished samples."""

from __future__ import annotations

from typing import Any

from dovetail.compat.modules.base_types import RolloutFnTrainOutput
from dovetail.compat.modules.mask import MultiTurnLossMaskGenerator
from dovetail.compat.modules.state import SamplingState
from dovetail.types import DataError, Sample

__all__ = ["generate_rollout"]


def generate_rollout(
    args: Any, rollout_id: int, data_buffer: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The next `rollout_batch_size` groups; what the assistant says in a conversation is learnt.

    A sample whose response is there already stays as it is. Needs no engine.

    Raises:
        DataError: called for evaluation, or a prompt is no conversation.
    """
    if evaluation:
        raise DataError("supervised data can't be evaluated by generating nothing")
    groups = data_buffer.get_samples(args.rollout_batch_size)
    maker = _Maker(args)
    for group in groups:
        for sample in group:
            maker.complete(sample)
    return RolloutFnTrainOutput(samples=groups)


class _Maker:
    def __init__(self, args: Any) -> None:
        self.args = args
        self._generator: Any = None

    def complete(self, sample: Sample) -> None:
        if not sample.response_length:
            self._tokenize(sample)
        sample.reward = 0.0 if sample.reward is None else sample.reward
        sample.status = Sample.Status.COMPLETED

    def _tokenize(self, sample: Sample) -> None:
        if not isinstance(sample.prompt, list):
            raise DataError(
                f"sample {sample.index}: supervised training needs a conversation (a list of "
                f"messages) as prompt, got {type(sample.prompt).__name__} (--input-key)"
            )
        if self._generator is None:
            kind = getattr(self.args, "loss_mask_type", "qwen")
            tokenizer = SamplingState(self.args).tokenizer
            self._generator = MultiTurnLossMaskGenerator(tokenizer, tokenizer_type=kind)
        tokens, mask = self._generator.get_loss_mask(
            sample.prompt, tools=sample.metadata.get("tools")
        )
        length = self._generator.get_response_lengths([mask])[0]
        if not length:
            raise DataError(f"sample {sample.index}: nothing in it is said by the assistant")
        sample.tokens, sample.response_length, sample.loss_mask = tokens, length, mask[-length:]
