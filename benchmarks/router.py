"""What a router costs: Dovetail's two ways beside sglang-router, vllm-router, and no router.

    .venv/bin/python benchmarks/router.py --quick --json out.json    # two minutes on 2 cores
    .venv/bin/python benchmarks/router.py --json out.json            # medians of 5 rounds

One engine that answers at once, or after 50 ms, in a process of its own; clients in another. The
compiled routers run in an environment of their own, `.venvs/routers`, made on the first run from
`requirements-routers.txt`. Method and results: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import machine, own_python

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venvs" / "routers"
REQUIREMENTS = ROOT / "benchmarks" / "requirements-routers.txt"
DELAY_MS = 50.0
START_S = 60.0


@dataclass(frozen=True)
class Load:
    """How clients ask."""

    name: str
    clients: int
    delayed: bool = False
    """The engine takes DELAY_MS for each answer."""


LOADS = (
    Load("1 client", 1),
    Load("32 clients, engine takes 50 ms", 32, delayed=True),
    Load("256 clients", 256),
)


@dataclass(frozen=True)
class Contender:
    """One way from a client to the engine."""

    name: str
    form: str
    """What clients ask in: `generate` is SGLang's form, `completions` OpenAI's."""
    command: tuple[str, ...] = ()
    """With {port} and {engine}; empty: straight to the engine."""


def contenders(routers: Path) -> list[Contender]:
    """Every way, those of one form side by side."""
    own = (str(own_python()), "-m", "benchmarks.router_own", "--port", "{port}")
    own = (*own, "--engine", "{engine}", "--way")
    worker = ("--worker-urls", "http://127.0.0.1:{engine}", "--host", "127.0.0.1")
    worker = (*worker, "--port", "{port}", "--prometheus-port", "{metrics}", "--log-level", "error")
    sglang = (str(routers / "bin" / "sglang-router"), "launch", *worker)
    vllm = (str(routers / "bin" / "vllm-router"), *worker)
    return [
        Contender("engine alone", "generate"),
        Contender("dovetail, passed on", "generate", (*own, "proxy", "--dialect", "sglang")),
        Contender("sglang-router 0.3.2", "generate", sglang),
        Contender("dovetail, translated", "generate", (*own, "bridge", "--dialect", "sglang")),
        Contender("engine alone", "completions"),
        Contender("dovetail, passed on", "completions", (*own, "proxy", "--dialect", "vllm")),
        Contender("vllm-router 0.1.17", "completions", vllm),
    ]


@dataclass
class Running:
    """A contender's process."""

    contender: Contender
    port: int
    process: subprocess.Popen[bytes] | None = None
    seen: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Load -> one measurement per round."""

    def cpu_s(self) -> float:
        """Processor time that the router has used, all threads of it."""
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ensure_routers() -> Path:
    """The environment with the compiled routers."""
    stamp = VENV / "made-from"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return VENV
    print(f"making {VENV} from {REQUIREMENTS.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    subprocess.run(pip, check=True)
    stamp.write_text(wanted)
    return VENV


@contextlib.contextmanager
def started(every: Sequence[Contender], logs: Path) -> Iterator[dict[bool, list[Running]]]:
    """Every contender before an engine that answers at once, and before one that takes a time."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        log = (logs / f"{name.replace(' ', '_')}.log").open("wb")
        with log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        processes.append(process)
        return process

    try:
        running: dict[bool, list[Running]] = {}
        for delayed in (False, True):
            engine = free_port()
            arguments = ["--port", str(engine), "--delay-ms", str(DELAY_MS * delayed)]
            start(
                f"engine_{delayed}",
                [str(own_python()), "-m", "benchmarks.router_engine", *arguments],
            )
            wait_until_open(engine)
            running[delayed] = [one_started(one, engine, start) for one in every]
        for one in [*running[False], *running[True]]:
            wait_until_open(one.port, http=one.process is not None)
        yield running
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def one_started(contender: Contender, engine: int, start: Any) -> Running:
    """One contender before the engine at this port."""
    if not contender.command:
        return Running(contender, engine)
    port = free_port()
    values = {"port": port, "engine": engine, "metrics": free_port()}
    command = [part.format(**values) for part in contender.command]
    return Running(contender, port, start(f"{contender.name}_{contender.form}_{engine}", command))


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def wait_until_open(port: int, http: bool = False) -> None:
    """Returns when a client can connect, or GET /health is answered with 200."""
    end = time.monotonic() + START_S
    while True:
        try:
            if http:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            else:
                socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def measure(one: Running, load: Load, seconds: float) -> dict[str, float]:
    """One load on one contender."""
    before = one.cpu_s()
    arguments = ["--port", str(one.port), "--form", one.contender.form]
    arguments += ["--clients", str(load.clients), "--seconds", str(seconds)]
    done = subprocess.run(
        [str(own_python()), "-m", "benchmarks.router_load", *arguments],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    seen: dict[str, float] = json.loads(done.stdout)
    seen["cpu_us"] = (one.cpu_s() - before) / seen["all"] * 1e6
    return seen


def run(rounds: int, seconds: float) -> list[Running]:
    """All rounds: each turns through all contenders, every second one backwards."""
    logs = ROOT / "outputs" / "benchmarks" / "router_logs"
    logs.mkdir(parents=True, exist_ok=True)
    with started(contenders(ensure_routers()), logs) as running:
        for number in range(rounds + 1):
            # The first one warms up, and counts not.
            one_round(running, seconds if number else 1.0, number)
            print(f"round {number} of {rounds}", flush=True)
        for fast, slow in zip(running[False], running[True], strict=True):
            fast.seen |= slow.seen
        return running[False]


def one_round(running: Mapping[bool, list[Running]], seconds: float, number: int) -> None:
    """Every load on every contender; every second round backwards."""
    for load in LOADS:
        turn = running[load.delayed]
        for one in turn if number % 2 else reversed(turn):
            seen = measure(one, load, seconds)
            if number:
                one.seen.setdefault(load.name, []).append(seen)


def summary(running: Sequence[Running]) -> list[dict[str, Any]]:
    """A row for each contender and load: medians over rounds; latencies also as what they have
    beyond the engine's alone, of the same round."""
    alone = {one.contender.form: one for one in running if one.process is None}
    rows = []
    for one in running:
        for load in LOADS:
            seen, bare = one.seen[load.name], alone[one.contender.form].seen[load.name]
            row: dict[str, Any] = {
                "contender": one.contender.name,
                "form": one.contender.form,
                "load": load.name,
                "failed": sum(each["failed"] for each in seen),
            }
            for key in ("per_s", "p50", "p95", "p99", "cpu_us"):
                values = [each[key] for each in seen]
                row[key] = statistics.median(values)
                row[f"{key}_range"] = [min(values), max(values)]
            for key in ("p50", "p95", "p99"):
                more = [a[key] - b[key] for a, b in zip(seen, bare, strict=True)]
                row[f"{key}_added"] = statistics.median(more)
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a person."""
    lines = []
    for load in LOADS:
        lines += [load.name, f"{'':36}{'req/s':>8}{'p50':>9}{'+p50':>8}{'+p95':>8}{'+p99':>8}"]
        lines[-1] += f"{'cpu us':>8}  failed"
        for row in rows:
            if row["load"] == load.name:
                name = f"{row['form']}: {row['contender']}"
                added = "".join(f"{row[f'{key}_added']:8.2f}" for key in ("p50", "p95", "p99"))
                figures = f"{row['per_s']:8.0f}{row['p50']:9.2f}{added}{row['cpu_us']:8.0f}"
                lines.append(f"  {name:34}{figures}  {row['failed']:.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--json", type=Path, help="where the result goes")
    given = parser.parse_args(arguments)
    rounds, seconds = (2, 2.0) if given.quick else (given.rounds, given.seconds)
    facts = machine()
    rows = summary(run(rounds, seconds))
    print(table(rows))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": facts, "rounds": rounds, "seconds": seconds, "rows": rows}
        given.json.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
