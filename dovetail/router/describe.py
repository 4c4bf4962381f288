"""What a route says about itself: one line, and how its request is read.

The reading is the declaration: `dovetail.router.openapi` runs it on a recorder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dovetail.router.bridge import Bridge
from dovetail.router.fields import Fields

NOT_HERE = "Not to be had"
"""How the line of a route begins that is there to say why not."""
Handler = TypeVar("Handler", bound=Callable[..., Any])
Read = Callable[[Fields, Bridge], object]
"""Reads a body; what it gives is the handler's matter."""


def alone(read: Callable[[Fields], object]) -> Read:
    """A reading that needs no engine."""
    return lambda fields, bridge: read(fields)


def described(
    summary: str, read: Read | None = None, query: tuple[str, ...] = ()
) -> Callable[[Handler], Handler]:
    """Tell of a handler.

    Args:
        summary: one line.
        read: what the handler reads its body with; None: it reads none.
        query: parameters in the address that it looks at.
    """

    def told(handler: Handler) -> Handler:
        handler.__dict__["described"] = (summary, read, query)
        return handler

    return told


def description_of(handler: Any) -> tuple[str, Read | None, tuple[str, ...]] | None:
    """What `described` told of it."""
    return getattr(handler, "described", None)
