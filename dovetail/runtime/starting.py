"""What a person is told while engines start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dovetail.engines.launch import LaunchSpec
from dovetail.runtime.health import Member

SAY_EVERY_S = 20.0
"""Between two words about who does not answer yet."""
Say = Callable[[str], None]


class Spec(Protocol):
    """An engine of a fleet, see `runtime.fleet.EngineSpec`."""

    @property
    def launch(self) -> Callable[[int], LaunchSpec] | None: ...

    @property
    def url(self) -> str | None: ...


def what_begins(specs: Sequence[Spec], log_dir: Path) -> str:
    """Who is started or reached, in a line."""
    started = sum(spec.launch is not None for spec in specs)
    many = "" if len(specs) == 1 else "s"
    if started:
        return f"starting {started} engine{many}; logs in {log_dir}"
    return f"reaching {len(specs)} engine{many}: {', '.join(str(spec.url) for spec in specs)}"


async def tell(starts: Mapping[asyncio.Task[None], Member], most_s: float, say: Say) -> None:
    """Say every now and then who is waited for, and why as far as it can be seen."""
    began = time.monotonic()
    while True:
        await asyncio.sleep(SAY_EVERY_S)
        late = [member for start, member in starts.items() if not start.done()]
        waited = time.monotonic() - began
        seen = await asyncio.gather(*(member.condition() for member in late))
        said = [f"\n  {one.name}: {why}" for one, why in zip(late, seen, strict=True)]
        say(
            f"waiting for {', '.join(one.name for one in late)} for {waited:.0f} s, at most "
            f"{most_s:.0f} s (--engine-start-timeout-s){''.join(said)}"
        )
