"""Well-behaved clients, thousands at a time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from benchmarks.soak_http import Answer, Connection, Target

_CONNECTING = 200
_MESSAGES = [{"role": "user", "content": "12+34="}]


async def agents(
    target: Target, many: int, turns: int, waits: list[float] | None = None
) -> Counter[str]:
    """So many agents at once: all connected first, then each in a session of its own, `turns`
    turns of conversation. What each turn waited for, in seconds, comes to `waits`."""
    waits = [] if waits is None else waits
    turn, all_there = asyncio.Semaphore(_CONNECTING), asyncio.Barrier(many)
    found: Counter[str] = Counter()

    async def agent() -> None:
        connection = Connection(target)
        async with turn:
            await connection.__aenter__()
        try:
            await all_there.wait()
            found[await _conversation(connection, turns, waits)] += 1
        finally:
            connection.reset()

    await asyncio.gather(*(agent() for _ in range(many)))
    return found


async def _conversation(connection: Connection, turns: int, waits: list[float]) -> str:
    """`ok`, or what went wrong first."""
    opened = await connection.ask("POST", "/sessions", {})
    if opened.status != 200:
        return f"open {opened.status}"
    path = f"/sessions/{opened.json['session_id']}"
    messages: list[object] = list(_MESSAGES)
    for _ in range(turns):
        body = {"messages": messages, "max_tokens": 4, "temperature": 0.0}
        started = time.perf_counter()
        answer = await connection.ask("POST", f"{path}/v1/chat/completions", body)
        waits.append(time.perf_counter() - started)
        if answer.status != 200:
            return f"chat {answer.status}"
        messages += [answer.json["choices"][0]["message"], *_MESSAGES]
    recorded: Answer = await connection.ask("GET", path)
    if len(recorded.json["records"]) != turns:
        return "lost a turn"
    return "ok" if (await connection.ask("DELETE", path)).status == 200 else "not ended"


async def crowd(target: Target, many: int, held_s: float) -> Counter[str]:
    """So many connections at once, that ask for nothing: those over the limit are told."""
    turn = asyncio.Semaphore(_CONNECTING)
    found: Counter[str] = Counter()

    async def one() -> None:
        connection = Connection(target)
        async with turn:
            await connection.__aenter__()
        try:
            answer = await connection.answer(held_s)
            found[str(answer.status) if answer.status else "closed"] += 1
        except TimeoutError:
            found["held"] += 1
        finally:
            connection.reset()

    await asyncio.gather(*(one() for _ in range(many)))
    return found
