"""A fleet of quick engines in a directory of its own, and what tests ask of it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from dovetail.engines.launch import ClientSettings, LaunchSpec
from dovetail.engines.process import HeldPort, ServerProcess
from dovetail.engines.sglang.client import make_client
from dovetail.runtime.fleet import EngineSpec, Fleet
from dovetail.runtime.health import HealthSettings
from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
from dovetail.types import GenerateRequest, SamplingParams

PROGRAM = Path(__file__).parents[2] / "quick_engine.py"
HASTY = HealthSettings(
    interval_s=0.1,
    timeout_s=1.0,
    failure_threshold=2,
    start_timeout_s=20.0,
    waits_for_attached=True,
    repairs=True,
)
CLIENT = ClientSettings(max_context_len=256, vocab_size=80)


class Place:
    """Where a test's engines write, and what they are."""

    def __init__(self, path: Path, *, token_s: float = 0.0, load_s: float = 0.0) -> None:
        self.path, self.witness = path, path / "witness.jsonl"
        self.delays = [str(token_s), str(load_s)]
        self.model_dir = path / "model"
        self.model_dir.mkdir()
        (self.model_dir / "config.json").write_text("{}")
        self.fleets: list[Fleet] = []
        self.alone: list[tuple[ServerProcess, HeldPort]] = []

    def start_alone(self) -> str:
        """An engine that no fleet has started; its address."""
        port, launch = HeldPort(), self.quick().launch
        assert launch is not None
        log = self.path / f"alone_{len(self.alone)}.log"
        server = ServerProcess(launch(port.number).argv, log_file=log, name="engine alone")
        self.alone.append((server, port))
        server.start()
        return port.url

    def quick(self, number: int = 0) -> EngineSpec:
        def launch(port: int) -> LaunchSpec:
            start = [sys.executable, "-I", "-S", str(PROGRAM), str(port), str(self.witness)]
            return LaunchSpec([*start, *self.delays])

        return EngineSpec(f"engine {number} (quick)", connect, launch=launch)

    def broken(self, number: int = 0) -> EngineSpec:
        command = [sys.executable, "-S", "-c", "print('no such model'); raise SystemExit(3)"]
        return EngineSpec(
            f"engine {number} (broken)", connect, launch=lambda port: LaunchSpec(command)
        )

    def fleet(self, *specs: EngineSpec, **changes: Any) -> Fleet:
        def store() -> SnapshotStore:
            return SnapshotStore(Wanted("disk", self.path / "weights"), self.model_dir)

        made = Fleet(specs, **{"health": HASTY, "store": store, **changes})
        self.fleets.append(made)
        return made

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        lines = self.witness.read_text().splitlines() if self.witness.exists() else []
        events = [json.loads(line) for line in lines]
        return [one for one in events if kind in (None, one["event"])]

    def pids(self) -> list[int]:
        return [event["pid"] for event in self.events("start")]


def connect(url: str) -> Any:
    return make_client(url, CLIENT)


def end(place: Place) -> None:
    for fleet in place.fleets:
        fleet.close()
    for server, port in place.alone:
        server.kill()
        port.close()
    assert not [pid for pid in place.pids() if lives(pid)]
    weights = place.path / "weights"
    assert not weights.exists() or not list(weights.iterdir())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def request(number: int, tokens: int = 4) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=tokens, seed=number)
    return GenerateRequest(f"r{number}", (3, 4, 5), sampling)


async def until(found: Callable[[], Any], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def weights(version: int) -> Callable[[], Any]:
    return lambda: [("w", torch.full((4,), float(version)))]


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(main())


def first_lines(log: Path) -> int:
    return sum(line.startswith("--- ") for line in log.read_text().splitlines())
