"""`rollout.sft_rollout`: takes conversations from the data source as finished samples."""

from __future__ import annotations

from functools import cached_property
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

    Of a text and a label, the label is. A sample whose response is there already stays as it is.
    Needs no engine.

    Raises:
        DataError: called for evaluation, or a sample has nothing to learn.
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

    @cached_property
    def tokenizer(self) -> Any:
        return SamplingState(self.args).tokenizer

    def complete(self, sample: Sample) -> None:
        if not sample.response_length:
            self._tokenize(sample)
        sample.reward = 0.0 if sample.reward is None else sample.reward
        sample.status = Sample.Status.COMPLETED

    def _tokenize(self, sample: Sample) -> None:
        if isinstance(sample.prompt, list):
            self._tokenize_messages(sample)
        elif sample.label is not None:
            self._tokenize_pair(sample)
        else:
            raise DataError(
                f"sample {sample.index}: nothing in it is a response to learn: neither is its "
                "prompt a conversation (--input-key) nor has it a label (--label-key)"
            )

    def _tokenize_pair(self, sample: Sample) -> None:
        """A text and its answer, which ends there."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        answer = self.tokenizer.encode(str(sample.label), add_special_tokens=False) + end
        prompt = sample.tokens or self.tokenizer.encode(sample.prompt, add_special_tokens=False)
        sample.tokens = [*prompt, *answer]
        sample.response, sample.response_length = str(sample.label), len(answer)

    def _tokenize_messages(self, sample: Sample) -> None:
        if self._generator is None:
            kind = getattr(self.args, "loss_mask_type", "qwen")
            self._generator = MultiTurnLossMaskGenerator(self.tokenizer, tokenizer_type=kind)
        tools = sample.metadata.get("tools")
        tokens, mask = self._generator.get_loss_mask(sample.prompt, tools=tools)
        length = self._generator.get_response_lengths([mask])[0]
        if not length:
            raise DataError(f"sample {sample.index}: nothing in it is said by the assistant")
        sample.tokens, sample.response_length, sample.loss_mask = tokens, length, mask[-length:]
