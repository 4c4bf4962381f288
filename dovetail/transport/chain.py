"""Reading a snapshot that may be a delta: from what is held, or from the last one with everything.

`Chain.read` gives tensors by name; which of them depends on what is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.transport.delta import rebuilt
from dovetail.transport.receive import SnapshotReader, manifest_of
from dovetail.types.errors import EngineError

if TYPE_CHECKING:
    import torch

Held = Callable[[str], "torch.Tensor | None"]


@dataclass(frozen=True, slots=True)
class Arriving:
    """Weights of one version."""

    version: int
    state: str | None
    """What is held when all of it is taken; None: it is no part of a chain."""
    whole: bool
    """Whether it is every tensor, not only those that changed."""
    tensors: Iterator[tuple[str, torch.Tensor]]
    """Compared with their digests one by one, where it is a chain: what raises here broke off."""


@contextlib.contextmanager
def arriving(
    reader: SnapshotReader, directory: Path, state: str | None, held: Held
) -> Iterator[Arriving]:
    """The weights of a snapshot, valid meanwhile.

    Args:
        state: what is held now; None: not known, so that everything is needed.
        held: the tensor held by a name; None where there is none.

    Raises:
        EngineError: it is not a snapshot, or damaged.
    """
    manifest = manifest_of(directory)
    links = manifest.get("chain") or [{"directory": directory.name, "state": None}]
    states = [link["state"] for link in links]
    begin = states.index(state) + 1 if state is not None and state in states else 0
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(reader.opened(directory.parent / link["directory"]))
            for link in links[begin:]
        ]
        results = [
            dict(manifest_of(directory.parent / link["directory"]).get("results", {}))
            for link in links[begin:]
        ]
        version = int(manifest["version"])
        if begin == 0 and len(links) == 1:
            full = found[0].tensors
            yield Arriving(version, states[-1], True, iter(full.items()))
            return
        deltas = [(one.tensors, told) for one, told in zip(found, results, strict=True)]
        base = held
        if begin == 0:
            full, full_results = deltas.pop(0)
            base = full.get
            names = dict.fromkeys([*full, *_names(results[1:])])
            changed = rebuilt(base, names, deltas)
            yield Arriving(version, states[-1], True, _all(full, changed, full_results, results))
            return
        names = dict.fromkeys(_names(results))
        yield Arriving(version, states[-1], False, rebuilt(base, names, deltas))


def _names(results: list[dict[str, str]]) -> list[str]:
    return [name for told in results for name in told]


def _all(
    full: dict[str, torch.Tensor],
    changed: Iterator[tuple[str, torch.Tensor]],
    first: dict[str, str],
    results: list[dict[str, str]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """What never changed since the full version, and the rest."""
    later = set(_names(results[1:]))
    for name, tensor in full.items():
        if name not in later:
            yield name, tensor
    yield from changed
    if first.keys() - full.keys():
        raise EngineError("the full version lacks tensors that it says it has")
