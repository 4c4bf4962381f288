"""A server under its keeper: it answers or says why not, and nothing of it outlives anybody."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail.engines.process import HeldPort, ServerProcess
from dovetail.types import EngineError

FAMILY = """
import os, signal, subprocess, sys, time
# One in its own session, whose parent ends at once.
subprocess.run([sys.executable, "-S", "-c",
    "import os, subprocess, sys;"
    "p = subprocess.Popen(['sleep', '600'], start_new_session=True);"
    f"print('orphan', p.pid, flush=True)"])
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
print("self", os.getpid(), flush=True)
time.sleep(600)
"""
SEMAPHORES = """
import multiprocessing, os, time
held = [multiprocessing.get_context("spawn").Semaphore() for _ in range(3)]
for one in held:
    print("name", one._semlock.name)
print("self", os.getpid(), flush=True)
time.sleep(600)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
POLITE = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *a: (print('bye', flush=True), sys.exit(3)))\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)"
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


@pytest.fixture
def started(log: Path) -> Iterator[list[ServerProcess]]:
    servers: list[ServerProcess] = []
    yield servers
    for server in servers:
        server.kill()


def _python(code: str, log: Path, servers: list[ServerProcess]) -> ServerProcess:
    server = ServerProcess([sys.executable, "-S", "-c", code], log_file=log, name="engine 0 (test)")
    servers.append(server)
    server.start()
    return server


def _wait_for(log: Path, *words: str) -> dict[str, int]:
    """Numbers after the words, once the log has a line for each."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = [line.split() for line in (log.read_text() if log.exists() else "").splitlines()]
        found = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[0] in words}
        if len(found) == len(words):
            return found
        time.sleep(0.02)
    raise AssertionError(f"{words} not in {log.read_text()}")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _assert_gone(*pids: int, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while any(map(_lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if _lives(pid)]


async def _yes() -> bool:
    return True


async def _no() -> bool:
    return False


def test_killing_a_server_kills_all_below_it_orphans_of_other_sessions_too(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python(FAMILY, log, started)
    pids = _wait_for(log, "orphan", "child", "self")
    assert set(pids.values()) <= set(server.pids)
    server.kill()
    assert not server.alive
    _assert_gone(*pids.values(), within_s=0.1)


def test_a_server_that_is_killed_leaves_nothing_and_says_how_it_ended(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python(FAMILY, log, started)
    pids = _wait_for(log, "orphan", "child", "self")
    os.kill(pids["self"], signal.SIGKILL)
    _assert_gone(*pids.values())
    while server.alive:
        time.sleep(0.01)
    assert server.ending == "it was ended by SIGKILL"


def test_a_keeper_that_is_killed_takes_its_server_along(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python(FAMILY, log, started)
    pids = _wait_for(log, "child", "self")
    assert server._keeper is not None
    os.kill(server._keeper.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.01)
    _assert_gone(*pids.values())


def test_what_a_killed_server_left_in_shared_memory_is_tidied_up(
    log: Path, started: list[ServerProcess]
) -> None:
    _python(SEMAPHORES, log, started)
    pids = _wait_for(log, "self")
    names = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("name ")]
    left = [Path(f"/dev/shm/sem.{name.removeprefix('/')}") for name in names]
    assert left and all(path.exists() for path in left)
    os.kill(pids["self"], signal.SIGKILL)
    while started[0].alive:
        time.sleep(0.01)
    assert not [path for path in left if path.exists()]


def test_adopted_processes_that_end_leave_no_zombies(
    log: Path, started: list[ServerProcess]
) -> None:
    code = (
        "import subprocess, sys, time\n"
        "for _ in range(3):\n"
        "    subprocess.run([sys.executable, '-S', '-c',\n"
        '        \'import subprocess; print("orphan", subprocess.Popen(["sleep", "0.1"]).pid)\'])\n'
        "print('ready 1', flush=True)\n"
        "time.sleep(600)"
    )
    server = _python(code, log, started)
    _wait_for(log, "ready")
    deadline = time.monotonic() + 10
    while len(server.pids) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(server.pids) == 1


def test_a_stopped_server_is_seen_and_can_be_ended(log: Path, started: list[ServerProcess]) -> None:
    server = _python(FAMILY, log, started)
    pids = _wait_for(log, "self")
    assert not server.stopped
    assert server._keeper is not None
    os.killpg(server._keeper.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not server.stopped and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.stopped
    asyncio.run(server.terminate(grace_s=0.2))
    assert not server.alive
    _assert_gone(*pids.values(), within_s=0.1)


def test_a_server_that_ends_when_asked_is_not_killed(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python(POLITE, log, started)
    while "\nready" not in log.read_text():
        time.sleep(0.01)
    asyncio.run(server.terminate(grace_s=30))
    assert (server.exit_code, server.log_tail) == (3, "ready\nbye")


def test_a_server_that_does_not_end_when_asked_is_killed(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python(STUBBORN, log, started)
    time.sleep(0.3)
    asyncio.run(server.terminate(grace_s=0.2))
    assert not server.alive


def test_one_that_ends_before_it_is_ready_says_why(log: Path, started: list[ServerProcess]) -> None:
    server = _python("print('no memory for this'); raise SystemExit(7)", log, started)
    with pytest.raises(EngineError, match=r"exit code 7(.|\n)*no memory for this"):
        asyncio.run(server.wait_ready(_no, 30))


def test_a_command_line_that_is_refused_is_told_without_the_usage(
    log: Path, started: list[ServerProcess]
) -> None:
    program = (
        "import argparse, sys; p = argparse.ArgumentParser('server.py')\n"
        "[p.add_argument(f'--{name}-size') for name in ('block', 'cache', 'tensor-parallel')]\n"
        "p.parse_args(['--tensor-paralel-size=2'])"
    )
    server = _python(program, log, started)
    with pytest.raises(EngineError) as caught:
        asyncio.run(server.wait_ready(_no, 30))
    assert str(caught.value).endswith(
        "error: unrecognized arguments: --tensor-paralel-size=2 "
        "(did you mean --tensor-parallel-size?)"
    )
    assert "usage" not in str(caught.value)


def test_one_that_is_never_ready_is_ended_with_the_cure(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python("import time; time.sleep(600)", log, started)
    with pytest.raises(EngineError, match="--engine-start-timeout-s"):
        asyncio.run(server.wait_ready(_no, 0.2))
    assert not server.alive


def test_a_program_that_is_not_there_is_told(log: Path, started: list[ServerProcess]) -> None:
    server = ServerProcess(["/no/such/python"], log_file=log, name="engine 0 (vllm)")
    started.append(server)
    server.start()
    with pytest.raises(EngineError, match="/no/such/python can't be started: No such file"):
        asyncio.run(server.wait_ready(_no, 30))


def test_it_starts_anew_and_the_tail_is_of_the_last_start(
    log: Path, started: list[ServerProcess]
) -> None:
    server = _python("print('first'); raise SystemExit(1)", log, started)
    while server.alive:
        time.sleep(0.01)
    server.command = (sys.executable, "-S", "-c", "print('second'); import time; time.sleep(600)")
    server.start()
    asyncio.run(server.wait_ready(_yes, 30))
    while "second" not in server.log_tail:
        time.sleep(0.01)
    assert server.log_tail == "second"
    assert "first" in log.read_text()


def test_a_run_that_is_killed_takes_its_servers_and_directories_along(
    tmp_path: Path, log: Path
) -> None:
    doomed = tmp_path / "weights"
    doomed.mkdir()
    (doomed / "model.safetensors").write_bytes(b"x")
    run = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "from pathlib import Path\n"
            "from dovetail.engines.process import ServerProcess\n"
            "from dovetail.transport import keeper\n"
            f"ServerProcess([sys.executable, '-S', '-c', {FAMILY!r}], log_file=Path({str(log)!r}),"
            " name='engine').start()\n"
            "subprocess.Popen([sys.executable, '-I', '-S', keeper.__file__, str(os.getpid()),"
            f" '--remove', {str(doomed)!r}], start_new_session=True)\n"
            "print('started', flush=True)\n"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert run.stdout is not None and run.stdout.readline()
        pids = _wait_for(log, "orphan", "child", "self")
        assert all(map(_lives, pids.values()))
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    _assert_gone(*pids.values())
    deadline = time.monotonic() + 10
    while doomed.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not doomed.exists()


def test_a_held_port_is_the_servers_alone() -> None:
    port = HeldPort()
    try:
        # Nobody answers there yet.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port.number), timeout=5)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port.number))
            server.listen()
            socket.create_connection(("127.0.0.1", port.number), timeout=5).close()
    finally:
        port.close()
