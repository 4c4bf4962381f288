"""What computes keys, values and logits for the engine: the contract, and which of the two runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from dovetail.engines.embedded.batch import RowBatch
from dovetail.engines.embedded.kv_cache import KVCache
from dovetail.engines.embedded.scheduler import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner(Protocol):
    """A model's forward on our cache."""

    cascade: bool
    """Whether rows can attend to a segment where it lies."""
    cache: KVCache

    def guard(self) -> AbstractContextManager[Any]:
        """The gradient mode that `prefill` and `decode` are called in."""
        ...

    def begin(self) -> None:
        """Generation starts; weights may have been written since it last ended."""
        ...

    def end(self) -> None:
        """Generation has ended or is held; the model is the trainer's again."""
        ...

    def prefill(self, pieces: Sequence[Piece]) -> None:
        """Compute and store the keys and values of these pieces."""
        ...

    def decode(self, batch: RowBatch) -> Tensor:
        """Feed one token per row, store its keys and values; returns logits [N, V] float32."""
        ...


def choose_runner(
    model: PreTrainedModel, cache: KVCache, *, fused: str, max_context_len: int
) -> tuple[Runner, str]:
    """The runner for this model and why it was chosen; each has been checked against the model's
    logits.

    Args:
        fused: "auto", "on" or "off".

    Raises:
        EngineError: `fused` is "on" and the fused path does not fit, or no path computes what the
        model
            computes.
    """
    from dovetail.engines.embedded.fuse import why_not_fusable
    from dovetail.engines.embedded.runner_fused import FusedRunner
    from dovetail.engines.embedded.runner_generic import GenericRunner
    from dovetail.types.errors import EngineError

    reason = "switched off" if fused == "off" else why_not_fusable(model)
    if reason is None:
        runner: Runner = FusedRunner(model, cache, max_context_len)
        reason = _why_wrong(model, runner, max_context_len, 1e-4, 0.05)
        if reason is None:
            return runner, "checked against the model's own logits"
    if fused == "on":
        raise EngineError(
            f"fused decoding was asked for but does not fit this model: {reason}. "
            "Use --engine-fused auto (engine.engine_fused)"
        )
    generic = GenericRunner(model, cache)
    wrong = _why_wrong(model, generic, max_context_len, 1e-3, 0.1)
    if wrong is not None:
        raise EngineError(
            f"the embedded engine does not compute what {type(model).__name__} computes: {wrong}. "
            "Use another --rollout-engine (engine.rollout_engine)"
        )
    return generic, reason


def _why_wrong(
    model: PreTrainedModel, runner: Runner, max_context_len: int, exact: float, rounded: float
) -> str | None:
    import torch

    from dovetail.engines.embedded.selfcheck import logit_difference

    allowed = exact if runner.cache.dtype == torch.float32 else rounded
    with torch.no_grad():
        difference = logit_difference(model, runner, max_context_len)
    if difference <= allowed:
        return None
    return (
        f"its logits differ from the model's by {difference:.2g} (relative), allowed {allowed:.2g}"
    )
