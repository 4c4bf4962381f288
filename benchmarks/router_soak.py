"""Does the router stand what clients can do to it?

    python benchmarks/router_soak.py                       # about 12 minutes on 2 busy cores
    python benchmarks/router_soak.py --scale 0.05 --json soak.json
    python benchmarks/router_soak.py --engines 2           # a fleet behind it

`dovetail serve` runs in a process of its own with a model that is made here. A round is

    agents     10,000 connections, then a session on each at once: opened, asked, read, ended
    crowd      17,000 connections, of which 16,384 are let in
    hostile    slow, deaf, silent and vanishing clients, 100 MB bodies, huge heads, what is no HTTP,
               wrong tokens; every field of every route spoilt in every way

and an ordinary client asks all the while. What grew in the first round is what a server needs;
after that a leak grows in every round, and what allocators keep does not. The exit code is 1 when
something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import soak_clients, soak_crowd, soak_probe
from benchmarks.soak_http import Target
from benchmarks.soak_model import make_model
from benchmarks.soak_server import Server, Usage, serve_command, serving

AGENTS = 10_000
CONNECTIONS = 16_384
OVER = 0.04
"""How much of its connections too many the crowd is."""
TURNS = 2
_HELD_S = 10.0
_GROWTH_MB = 32.0
"""Memory that every round after the first may add."""
_MOST_MB = 6_000.0
_ERROR = re.compile(r"^\w*(Error|Exception)\b|never retrieved|never awaited|^CRITICAL|^ERROR")


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seed: int = 0
    scale: float = 1.0
    """Share of the clients."""
    connections: int = CONNECTIONS
    """How many the server takes."""
    patience: float = 1.0
    """Share of the time for which clients hold out."""
    rounds: int = 3
    """Two or more."""


@dataclass
class Phase:
    """One part of a round."""

    name: str
    seconds: float = 0.0
    ended: dict[str, dict[str, int]] = field(default_factory=dict)
    """How clients of each kind ended."""
    asked: dict[str, str] = field(default_factory=dict)
    """How ordinary clients fared meanwhile."""
    peak_mb: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def take(self, kind: str, found: Mapping[str, int], allowed: frozenset[str]) -> None:
        """Note how clients ended."""
        self.ended[kind] = dict(sorted(found.items()))
        odd = {end: count for end, count in found.items() if end not in allowed}
        if odd:
            self.wrong.append(f"{self.name}, {kind}: {odd}, allowed {sorted(allowed)}")


@dataclass
class Soak:
    """Everything that was found."""

    usage: list[Usage] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def judge(self, server: Server) -> None:
        """What is wrong, beside what phases noted."""
        self.wrong += [text for phase in self.phases for text in phase.wrong]
        if not server.alive:
            self.wrong.append("the server is gone")
            return
        rounds = self.usage[1:]
        grown = [after.rss_mb - before.rss_mb for before, after in pairwise(rounds)]
        if min(grown) > _GROWTH_MB:
            told = ", ".join(f"{usage.rss_mb:.0f}" for usage in rounds)
            self.wrong.append(f"memory grew in every round: {told} MB")
        first, last = rounds[0], rounds[-1]
        for name in ("files", "threads", "tasks"):
            before, after = getattr(first, name), getattr(last, name)
            if after > before:
                self.wrong.append(f"{name} grew: {before} to {after}")
        peak = max(phase.peak_mb for phase in self.phases)
        if peak > _MOST_MB:
            self.wrong.append(f"memory peaked at {peak:.0f} MB, expected at most {_MOST_MB:.0f}")


@asynccontextmanager
async def _phase(soak: Soak, server: Server, name: str) -> AsyncIterator[Phase]:
    """A phase, with ordinary clients beside it."""
    phase = Phase(name)
    soak.phases.append(phase)
    server.forget_peak()
    started = time.perf_counter()
    async with soak_probe.asking(server.target) as asked:
        yield phase
    phase.seconds = time.perf_counter() - started
    phase.peak_mb = server.peak_mb
    for client, one in asked.items():
        phase.asked[client] = one.told()
        if one.wrong:
            phase.wrong.append(f"{name}: the client `{client}` got {dict(one.wrong)}")
        if not one.seconds:
            phase.wrong.append(f"{name}: the client `{client}` was not answered")
    print(f"  {name}: {phase.seconds:.0f} s, peak {phase.peak_mb:.0f} MB", flush=True)
    for kind, found in [*phase.asked.items(), *phase.ended.items()]:
        print(f"    {kind}: {found}", flush=True)


async def round_of(soak: Soak, server: Server, plan: Plan) -> None:
    """One round, all phases of it."""
    async with _phase(soak, server, "agents") as phase:
        agents = max(2, round(AGENTS * plan.scale))
        turns = soak_probe.Asked()
        found = await soak_crowd.agents(server.target, agents, TURNS, turns.seconds)
        phase.take("agents", found, frozenset({"ok"}))
    print(f"    agents' turns: {turns.told()}", flush=True)
    phase.asked["agents' turns"] = turns.told()
    async with _phase(soak, server, "crowd") as phase:
        over = round(plan.connections * OVER)
        many, held_s = plan.connections + over, _HELD_S * plan.patience
        found = await soak_crowd.crowd(server.target, many, held_s)
        phase.take("crowd", found, frozenset({"held", "503", soak_clients.GONE}))
        # Two ordinary clients and one that just looked have a place too.
        if not over <= found["503"] <= over + 3:
            phase.wrong.append(f"crowd: {found['503']} were told 503, expected {over}")
    async with _phase(soak, server, "hostile") as phase:
        await _hostile(phase, server.target, plan)


async def _hostile(phase: Phase, target: Target, plan: Plan) -> None:
    """All bands at once."""

    async def band(one: soak_clients.Band) -> None:
        phase.take(one.name, await one.run(target, plan.seed, plan.scale), one.allowed)

    async def spoilt() -> None:
        found = await soak_clients.spoil(target, plan.seed, min(1.0, plan.scale))
        phase.take("spoilt fields", found, soak_clients.SPOILT_ALLOWED)

    await asyncio.gather(spoilt(), *(band(one) for one in soak_clients.BANDS))


async def soak_of(server: Server, plan: Plan) -> Soak:
    """All rounds, and what they left behind."""
    soak = Soak()
    server.target = replace(server.target, patience=plan.patience)
    soak.usage.append(await server.settled())
    print(f"before: {soak.usage[-1]}", flush=True)
    for number in range(1, plan.rounds + 1):
        print(f"round {number}", flush=True)
        await round_of(soak, server, replace(plan, seed=plan.seed + number))
        soak.usage.append(await server.settled())
        print(f"after round {number}: {soak.usage[-1]}", flush=True)
    soak.judge(server)
    return soak


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the clients")
    parser.add_argument("--rounds", type=int, default=3, help="2 or more")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--log", type=Path, default=None, help="keep the server's log here")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak_") as place:
        directory = Path(place)
        model = make_model(directory / "model", options.seed)
        flags = ["--rollout-num-engines", str(options.engines), "--run-dir", str(directory / "run")]
        limit = max(64, round(CONNECTIONS * options.scale))
        flags += ["--router-max-connections", str(limit)]
        plan = Plan(options.seed, options.scale, limit, rounds=max(2, options.rounds))
        with serving(serve_command(model, flags), directory / "server.log") as server:
            soak = uvloop.run(soak_of(server, plan))
        soak.wrong += complaints(directory / "server.log")
        if options.log is not None:
            shutil.copy(directory / "server.log", options.log)
    for text in soak.wrong:
        print(f"WRONG {text}")
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(soak), indent=2) + "\n", encoding="utf-8")
    return 1 if soak.wrong else 0


def complaints(log: Path) -> list[str]:
    """What the server's log has of errors."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = Counter(line[:200] for line in lines if _ERROR.search(line))
    return [f"the log has {count} times: {line}" for line, count in found.items()]


if __name__ == "__main__":
    sys.exit(main())
