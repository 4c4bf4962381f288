"""The order of prompts in an epoch: a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import random


def epoch_order(num_prompts: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Positions of an epoch in the order they are served; file order without `shuffle`.

    The order depends on the four arguments alone: not on earlier epochs, the process or the version
    of Python, whose `random()` is promised to stay the same for a seed while its `shuffle` is not.
    """
    order = list(range(num_prompts))
    if not shuffle:
        return order
    digest = hashlib.blake2b(f"epoch order {seed} {epoch}".encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    # Fisher-Yates, from the end.
    for last in range(num_prompts - 1, 0, -1):
        chosen = int(draw() * (last + 1))
        order[last], order[chosen] = order[chosen], order[last]
    return order
