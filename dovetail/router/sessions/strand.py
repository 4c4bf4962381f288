"""Ids that continue each other, as one sample: what was sampled, and what stood between.

    context ids (loss mask 0) | sampled ids (1, with the engine's logprobs) | context | sampled ...

What stands before the first turn's response is the sample's prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dovetail.types import Sample


@dataclass
class TurnRecord:
    """One answered request."""

    prompt_ids: list[int]
    output_ids: list[int]
    finish_reason: str = "stop"
    output_log_probs: list[float] | None = None
    """One per output id; None: 0.0 each."""
    weight_version: str | None = None


@dataclass
class Strand:
    """Turns whose ids continue each other.

    Example:
        >>> strand = Strand(prompt_length=2)
        >>> strand.observe([1, 2])
        >>> strand.sampled([3], [-0.5])
        >>> strand.observe([4])
        >>> strand.sampled([5], [-0.1], ["7"])
        >>> sample = Sample()
        >>> strand.fill(sample)
        >>> sample.tokens, sample.response_length, sample.loss_mask
        ([1, 2, 3, 4, 5], 3, [1, 0, 1])
    """

    prompt_length: int
    """Ids at the start that are no part of the response."""
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 where the id was sampled and is to be trained on."""
    log_probs: list[float] = field(default_factory=list)
    """0.0 where the mask is 0."""
    last_response: int = 0
    """Where the last response begins."""
    finish_reason: str = "stop"
    weight_versions: list[str] = field(default_factory=list)

    def cut(self, keep: int) -> None:
        """Forget all but the first `keep` ids."""
        del self.tokens[keep:], self.mask[keep:], self.log_probs[keep:]

    def observe(self, ids: Iterable[int]) -> None:
        """Append what was not sampled."""
        before = len(self.tokens)
        self.tokens.extend(ids)
        added = len(self.tokens) - before
        self.mask += [0] * added
        self.log_probs += [0.0] * added

    def sampled(
        self,
        ids: Sequence[int],
        log_probs: Sequence[float] | None,
        weight_versions: Iterable[str] = (),
        finish_reason: str = "stop",
    ) -> None:
        """Append a response."""
        self.last_response = len(self.tokens)
        self.tokens += ids
        self.mask += [1] * len(ids)
        self.log_probs += log_probs or [0.0] * len(ids)
        self.finish_reason = finish_reason
        self.weight_versions += weight_versions

    def fill(self, sample: Sample) -> None:
        """Give `sample` these ids, with everything that is aligned to them, and its status."""
        start = self.prompt_length
        sample.tokens = list(self.tokens)
        sample.response_length = len(self.tokens) - start
        sample.loss_mask = self.mask[start:]
        sample.rollout_log_probs = self.log_probs[start:]
        sample.weight_versions = list(self.weight_versions)
        truncated = self.finish_reason == "length"
        sample.status = Sample.Status.TRUNCATED if truncated else Sample.Status.COMPLETED
