"""Whether engines hold what they were sent: digests of tensors, made by both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from dovetail.types.errors import WeightMismatchError

_SHOWN = 3


@runtime_checkable
class Holder(Protocol):
    """An engine that can say what it holds."""

    url: str

    async def weight_digests(self) -> Mapping[str, str]:
        """SHA-256 of each tensor's bytes by its Hugging Face name, made of what it holds."""
        ...


async def check_equal(holders: Sequence[Holder], version: int, sent: Mapping[str, str]) -> None:
    """Compare all of them with what was sent.

    Raises:
        WeightMismatchError: one differs; the message names engine and tensor.
        EngineError: one can't say what it holds.
    """
    held = await asyncio.gather(*(holder.weight_digests() for holder in holders))
    for holder, found in zip(holders, held, strict=True):
        wrong = differences(sent, found)
        if wrong:
            raise WeightMismatchError(
                f"{holder.url} does not hold the weights of version {version} that it was sent: "
                f"{len(wrong)} tensors differ, e.g. {', '.join(wrong[:_SHOWN])} "
                "(--check-weight-update-equal)"
            )


def differences(sent: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    """Names whose tensors are not the same, or on one side only."""
    return [name for name in sorted(sent.keys() | held.keys()) if sent.get(name) != held.get(name)]
