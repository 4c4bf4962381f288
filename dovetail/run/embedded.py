"""The engine of a configuration that runs in this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dovetail.checkpoint import hf
from dovetail.engines.table import engine_row, load
from dovetail.run.models import Models

if TYPE_CHECKING:
    from dovetail.engines.embedded.engine import EmbeddedEngine

MAX_RUNNING = 256
"""Sequences decoded at once where nothing says how many: more only lengthens the wait for the
first."""


def make_embedded(
    models: Models, compute: ThreadPoolExecutor, *, max_running: int, kv_tokens: int
) -> EmbeddedEngine:
    """An engine in this process (see `Models.sampled`), which decodes on the thread `compute`."""
    settings = models.config.engine
    made: EmbeddedEngine = load(engine_row(settings.rollout_engine).path)(
        models.sampled,
        models.tokenizer,
        max_running=max_running,
        kv_tokens=kv_tokens,
        max_context_len=models.context_len,
        fused=settings.engine_fused,
        cuda_graphs=settings.engine_cuda_graphs,
        eos_token_ids=hf.eos_token_ids(models.model, models.tokenizer),
        worker=compute,
    )
    return made


def make_serving(models: Models, compute: ThreadPoolExecutor) -> EmbeddedEngine:
    """An engine for whatever requests come."""
    settings = models.config.engine
    max_running = settings.engine_max_running or MAX_RUNNING
    needed = max_running * models.context_len
    kv_tokens = settings.engine_kv_tokens or min(
        needed, models.tokens_within(settings.engine_memory_gb)
    )
    return make_embedded(models, compute, max_running=max_running, kv_tokens=kv_tokens)
