"""A short form of benchmarks/router_soak.py: a hundredth of its clients, twice."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from benchmarks.router_soak import Plan, Soak, complaints, soak_of
from benchmarks.soak_model import make_model
from benchmarks.soak_server import serving

CONNECTIONS = 300


def test_clients_of_every_kind_leave_nothing_behind(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model", 0), tmp_path / "server.log"
    command = ["-m", "tests.loop.soaked_server", str(model), str(CONNECTIONS)]
    with serving([sys.executable, *command], log) as server:
        soak: Soak = asyncio.run(soak_of(server, Plan(0, 0.01, CONNECTIONS, 0.2, rounds=2)))
    assert soak.wrong == []
    assert complaints(log) == []
    for phase in soak.phases:
        assert phase.ended and all(phase.ended.values())
