"""The only place with the order of a weight update: pause, send, resume.

An engine between `pause` and `resume` makes no token, so no token is ever sampled from half-new
weights, and every token carries the version that it was sampled under.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from dovetail.types.ports import EngineControl

if TYPE_CHECKING:
    import torch

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]


async def publish(
    engines: Sequence[EngineControl], version: int, named_tensors: Callable[[], NamedTensors] | None
) -> None:
    """Give every engine the weights of `version`.

    Args:
        engines: all engines of the run.
        version: the trainer's version; one more than the last one published.
        named_tensors: makes a fresh iterator over the weights under their Hugging Face names,
        called
            once per engine; None when the engines read the trainer's own tensors (mode `local`), so
            that nothing is copied.
    """
    for engine in engines:
        await engine.pause()
    try:
        for engine in engines:
            await engine.receive_weights(version, named_tensors() if named_tensors else None)
    finally:
        for engine in engines:
            await engine.resume()
