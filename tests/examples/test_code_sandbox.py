"""Programs of the worst kind come to nothing, and a model learns from what the sandbox says."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from dovetail.hooks import ArgsView, bind
from dovetail.types import Sample
from examples.code_sandbox.make_prompts import make_prompts
from tests.examples.example_run import ROOT

HERE = ROOT / "examples" / "code_sandbox"
sys.path.append(str(HERE))

from sandbox import Limits, Reason, run_program  # noqa: E402

QUICK = {"wall_s": 2.0, "cpu_s": 1, "memory_bytes": 128 << 20}
HOSTILE = {
    "an infinite loop": ("while True: pass", Reason.TIMEOUT),
    "a long number": ("print(9**9**9)", Reason.TIMEOUT),
    "a sleep": ("import time; time.sleep(60)", Reason.TIMEOUT),
    "a loop deaf to signals": (
        "import signal\nfor n in (1, 2, 15, 24): signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        Reason.TIMEOUT,
    ),
    "a fork bomb": ("import os\nwhile True: os.fork()", Reason.FAILED),
    "a bomb of threads": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(9,)).start()",
        Reason.FAILED,
    ),
    "a subprocess": ("import subprocess; subprocess.run(['id'])", Reason.FAILED),
    "a memory hog": ("hoard = []\nwhile True: hoard.append(bytearray(1 << 20))", Reason.FAILED),
    "a write outside": ("open('OUTSIDE/evil', 'w').write('x')", Reason.FAILED),
    "an append outside": ("open('OUTSIDE/victim', 'a').write('x')", Reason.FAILED),
    "a removal outside": ("import os; os.remove('OUTSIDE/victim')", Reason.FAILED),
    "a way out through a link": (
        "import os; os.symlink('OUTSIDE', 'way'); open('way/evil', 'w')",
        Reason.FAILED,
    ),
    "a look at the answers": ("print(open('OUTSIDE/victim').read())", Reason.FAILED),
    "a huge file": (
        "f = open('big', 'w')\nwhile True: f.write('x' * 100000); f.flush()",
        Reason.FAILED,
    ),
    "too many open files": ("files = [open('a', 'w') for _ in range(99)]", Reason.FAILED),
    "a connection": (
        "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1)",
        Reason.FAILED,
    ),
    "a flood on stdout": ("while True: print('x' * 1000)", Reason.FLOODED),
    "a flood on stderr": (
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        Reason.FLOODED,
    ),
    "a shot at its parent": ("import os; os.kill(os.getppid(), 9)", Reason.FAILED),
    "an exit code": ("raise SystemExit(3)", Reason.FAILED),
    "no Python at all": ("1 +", Reason.FAILED),
    "a zero byte": ("print(1)\0", Reason.FAILED),
}
STANDING = asyncio.run(run_program("")).walls


@pytest.fixture
def listener():
    """A port of this machine that takes connections."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("fence", [True, False], ids=["fenced", "walls alone"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_come_to_nothing(name, fence, tmp_path, listener):
    if not fence and set(STANDING) != {"network", "files", "processes"}:
        pytest.skip(f"this kernel grants no other walls than {STANDING}")
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    victim = outside / "victim"
    victim.write_text("the answers")
    victim.chmod(0o666)
    source, expected = HOSTILE[name]
    source = source.replace("OUTSIDE", str(outside)).replace("PORT", str(listener))
    started = time.monotonic()
    outcome = asyncio.run(run_program(source, limits=Limits(**QUICK, fence=fence)))
    assert outcome.reason is expected, outcome
    assert time.monotonic() - started < 10
    assert len(outcome.stdout) <= 64 * 1024 and len(outcome.stderr) <= 64 * 1024
    assert "the answers" not in outcome.stdout
    assert victim.read_text() == "the answers" and os.listdir(outside) == ["victim"]


def test_nothing_is_left_of_a_program(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    source = "import os, time; open('file', 'w'); os.mkdir('folder'); time.sleep(60)"
    asyncio.run(run_program(source, limits=Limits(wall_s=0.5)))
    assert list(tmp_path.iterdir()) == []
    assert "program.py" not in _command_lines()


def _command_lines() -> str:
    files = Path("/proc").glob("[0-9]*/cmdline")
    return " ".join(file.read_text() for file in files if _ours(file))


def _ours(file: Path) -> bool:
    try:
        return f"PPid:\t{os.getpid()}\n" in (file.parent / "status").read_text()
    except OSError:
        return False


def test_a_cancelled_program_dies_with_its_reward():
    async def give_up():
        running = asyncio.create_task(run_program("while True: pass", limits=Limits(wall_s=50)))
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    started = time.monotonic()
    asyncio.run(give_up())
    assert time.monotonic() - started < 5
    assert "guard.py" not in _command_lines()


def test_decent_programs_get_what_they_need():
    source = (
        "import sys, math, json, random, decimal, collections, itertools, re, datetime\n"
        "open('notes.txt', 'w').write(sys.stdin.read())\n"
        "print(open('notes.txt').read().upper(), math.comb(5, 2), decimal.Decimal(2) ** 2)"
    )
    outcome = asyncio.run(run_program(source, stdin="abc"))
    assert (outcome.reason, outcome.stdout) == (Reason.FINISHED, "ABC 10 4\n"), outcome


def rewarded(response, label="7", **metadata):
    args = ArgsView(None, sandbox_cpu_s=1)
    sample = Sample(response=response, label=label, metadata=metadata)
    hook = bind("custom_rm", f"{HERE / 'reward.py'}:reward", args)
    return asyncio.run(hook(sample)), sample.metadata["sandbox"]


def test_the_reward_tells_wrong_programs_from_right_ones():
    expression = {"template": "print({})"}
    assert rewarded("3+4<eos>", **expression) == (1.0, ["finished"])
    assert rewarded("3+5<eos>", **expression) == (0.2, ["finished"])
    assert rewarded("3+<eos>", **expression) == (0.0, ["failed"])
    assert rewarded("9**9**9**9", **expression) == (0.0, ["timeout"])


def test_a_fenced_program_is_tried_on_every_test():
    response = "Double it:\n```python\nprint(2 * int(input()))\n```\nThat is all."
    tests = [{"stdin": "4", "stdout": "8\n"}, {"stdin": "x", "stdout": "?"}]
    reward, reasons = rewarded(response, tests=tests)
    assert (reward, reasons) == (pytest.approx(0.4), ["finished", "failed"])


def test_a_run_learns_to_write_programs_that_run(run_example, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    make_prompts(prompts)
    # Endless programs are common at first; each costs its whole time.
    (tmp_path / "limits.yaml").write_text("sandbox_wall_s: 0.6\n")
    flags = ["--prompt-data", prompts, "--num-rollout", 7, "--rollout-batch-size", 3]
    flags += ["--custom-config-path", tmp_path / "limits.yaml"]
    rows = run_example("code_sandbox", *flags)
    finished = [row["sandbox/finished"] for row in rows]
    assert sum(finished[-3:]) > sum(finished[:3]) + 0.3
    for row in rows:
        assert sum(v for k, v in row.items() if k.startswith("sandbox/")) == pytest.approx(1.0)
