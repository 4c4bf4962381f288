"""An engine's side of a meeting: tensors as they come, from joining to the last one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dovetail.transport.broadcast import BroadcastTaking
from dovetail.transport.buckets import Taking, all_taken, take_all
from dovetail.transport.handles import HandleTaking
from dovetail.transport.meeting import joined
from dovetail.types.weights import Meeting

if TYPE_CHECKING:
    import torch


def handed_over(
    meeting: Meeting,
    device: torch.device,
    check: Callable[[str, tuple[int, ...]], None],
    complete: Callable[[], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Join, and give every tensor by its Hugging Face name, each valid until the next is asked for.
    Blocks. The trainer counts this engine in when the iterator ends.

    Args:
        device: of the engine's weights.
        check: told of every name and shape before anything of its bucket is given.
        complete: called after the last tensor; the trainer is told only when it returns.

    Raises:
        BrokenUpdateError: it broke off, wherever; all of those who meet learn of it.
    """
    table = joined(meeting)
    taking: Taking | None = None
    try:
        table.hear("go")
        if meeting.transport == "broadcast":
            taking = BroadcastTaking(table, device)
        else:
            taking = HandleTaking(table, device)
        yield from take_all(table, taking, check)
        complete()
        all_taken(table)
    except BaseException as error:
        # Else the others would wait for us. Where the trainer is gone, nobody does.
        with contextlib.suppress(RuntimeError):
            table.break_off(f"engine {table.rank} broke off: {error!r}")
        raise
    finally:
        if taking is not None:
            taking.close()
