"""Two ordinary clients, in a process of their own, so that what they wait for is the server alone.

    python -m benchmarks.soak_probe HOST PORT      until its standard input ends

The token is in `DOVETAIL_SOAK_TOKEN`. Prints what `Asked` holds, by client, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.soak_http import Connection, Target

TOKEN = "DOVETAIL_SOAK_TOKEN"
_EVERY_S = 0.2
_ASK = {"text": "12+34=", "sampling_params": {"max_new_tokens": 4, "temperature": 0.0}}
CLIENTS: dict[str, tuple[str, str, Any]] = {
    "ordinary": ("POST", "/generate", _ASK),
    "health": ("GET", "/health", None),
}
"""Method, path, body."""


@dataclass
class Asked:
    """How a client fared."""

    seconds: list[float] = field(default_factory=list)
    wrong: dict[str, int] = field(default_factory=Counter)
    """Statuses that were not 200, and how often."""

    def told(self) -> str:
        """`n, p50, p99, longest` in seconds."""
        if len(self.seconds) < 2:
            return f"{len(self.seconds)} requests"
        cuts = quantiles(self.seconds, n=100, method="inclusive")
        text = f"{len(self.seconds)} requests, p50 {cuts[49]:.3f}"
        return f"{text}, p99 {cuts[98]:.3f}, longest {max(self.seconds):.3f} s"


async def client(target: Target, name: str, ready: asyncio.Semaphore, over: asyncio.Event) -> Asked:
    """One client that asks every 0.2 seconds, on a connection that it keeps."""
    found = Asked()
    async with Connection(target) as connection:
        await connection.ask(*CLIENTS[name])
        ready.release()
        while not over.is_set():
            started = time.perf_counter()
            answer = await connection.ask(*CLIENTS[name])
            found.seconds.append(time.perf_counter() - started)
            if answer.status != 200:
                found.wrong[str(answer.status)] = found.wrong.get(str(answer.status), 0) + 1
            if answer.status == 0:
                break
            await asyncio.sleep(_EVERY_S)
    return found


@asynccontextmanager
async def asking(target: Target) -> AsyncIterator[dict[str, Asked]]:
    """Both, while the block runs; how they fared is there after it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.soak_probe", target.host, str(target.port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, TOKEN: target.token or ""},
        cwd=Path(__file__).parents[1],
    )
    found: dict[str, Asked] = {}
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        yield found
        told, _ = await process.communicate(b"")
        found |= {name: Asked(**one) for name, one in json.loads(told).items()}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _main(host: str, port: str) -> None:
    ready, over = asyncio.Semaphore(0), asyncio.Event()
    target = Target(host, int(port), os.environ.get(TOKEN) or None)
    doing = [asyncio.ensure_future(client(target, name, ready, over)) for name in CLIENTS]
    for _ in CLIENTS:
        await ready.acquire()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    over.set()
    made = zip(CLIENTS, await asyncio.gather(*doing), strict=True)
    print(json.dumps({name: asdict(one) for name, one in made}))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
