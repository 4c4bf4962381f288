"""Whether a runner computes what the model's own forward computes, tried on short sequences."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dovetail.engines.embedded.batch import RowBatch
from dovetail.engines.embedded.kv_cache import KVCache
from dovetail.engines.embedded.runner import Runner
from dovetail.engines.embedded.scheduler import Scheduler
from dovetail.engines.embedded.sequence import Sequence
from dovetail.types.calls import GenerateRequest, SamplingParams

_LENGTH = 24
_LONGEST_WINDOW = 128


def logit_difference(model: PreTrainedModel, runner: Runner, max_context_len: int) -> float:
    """Largest relative difference of a runner's logits from the model's own, over three sequences.

    Two of them share a prompt, one goes on from a part of a response. Runs on a small cache of its
    own.

    Returns:
        max over sequences of ||runner - module|| / ||module||.
    """
    device = next(model.parameters()).device
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    length = _LENGTH if window is None or window > _LONGEST_WINDOW else window + _LENGTH
    length = max(4, min(length, max_context_len - 2))
    shared = [(7 * i + 3) % config.vocab_size for i in range(length)]
    requests = [
        GenerateRequest("a", tuple(shared), SamplingParams(max_new_tokens=1)),
        GenerateRequest("b", (*shared, 1), SamplingParams(max_new_tokens=1), 1),
        GenerateRequest("c", tuple(shared[: length // 2]), SamplingParams(max_new_tokens=1)),
    ]
    sequences = [Sequence(r, 0, (), i, None) for i, r in enumerate(requests)]
    own_cache = runner.cache
    shapes, dtype = own_cache.shapes, own_cache.dtype
    runner.cache = KVCache(shapes, 8 * length + 64, dtype, device)
    try:
        logits = _logits(runner, sequences, device)
    finally:
        runner.cache = own_cache
    worst = 0.0
    for row, sequence in zip(logits, sequences, strict=True):
        ids = torch.tensor([sequence.tokens], device=device)
        wanted = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        scale = wanted.norm().clamp_min(1e-12)
        worst = max(worst, float((row - wanted).norm() / scale))
    return worst


def _logits(runner: Runner, sequences: list[Sequence], device: torch.device) -> torch.Tensor:
    scheduler = Scheduler(runner.cache, len(sequences), runner.cascade, min_saved_tokens=0)
    for sequence in sequences:
        scheduler.add(sequence)
    work = scheduler.admit(version=0)
    runner.prefill(work.segments)
    for segment, row in work.copies:
        runner.cache.copy_segment_to_row(segment, row)
    runner.prefill(work.tails)
    scheduler.make_room_for_step()
    return runner.decode(RowBatch(scheduler.running, device))
