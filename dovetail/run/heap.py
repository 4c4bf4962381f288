"""What a run is made of is looked through by the garbage collector once, not at every step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """Leaves all that exists now (modules, model, data) out of garbage collection inside the block.

    A rollout makes enough short-lived objects for several full collections, each of which would
    walk through every module and row again. What becomes garbage by counting is freed as ever.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
