from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import time
from pathlib import Path

import pytest

from dovetail.compat.agent.adapters import AnthropicAdapter, OpenAIAdapter
from dovetail.compat.agent.aiohttp_threaded import run_app_in_thread
from dovetail.compat.agent.harness import CLAUDE_CODE, CODEX, BaseHarness
from dovetail.compat.agent.sandbox import (
    E2BSandbox,
    LocalSandbox,
    Sandbox,
    ensure_agent_user,
    exec_and_wait,
)
from dovetail.types import ConfigError, Sample
from tests.compat.agent.engine import Engine, Letters

# Stands for the agents' own commands: one request by the environment that they would read.
AGENT = """#!/usr/bin/env python3
import json, os, sys, urllib.request
prompt = sys.argv[2] if sys.argv[1] == "-p" else sys.argv[-1]
if "ANTHROPIC_BASE_URL" in os.environ:
    url, key = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", os.environ["ANTHROPIC_AUTH_TOKEN"]
else:
    assert 'wire_api = "chat"' in open(os.environ["CODEX_HOME"] + "/config.toml").read()
    url, key = os.environ["OPENAI_BASE_URL"] + "/chat/completions", os.environ["OPENAI_API_KEY"]
body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 9}
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + key}
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
print(urllib.request.urlopen(request, timeout=20).read().decode())
sys.exit(int(os.environ.get("AGENT_EXIT", "0")))
"""


def test_a_local_sandbox_runs_commands_and_keeps_files_until_it_ends(tmp_path: Path) -> None:
    async def use() -> Path:
        async with LocalSandbox("ignored") as sandbox:
            assert isinstance(sandbox, Sandbox)
            (tmp_path / "own").write_bytes(b"own")
            await sandbox.write_file("a/b.txt", "text")
            await sandbox.write_file("c", tmp_path / "own", user="agent")
            assert await sandbox.exec("cat a/b.txt c; echo err >&2; exit 3") == (
                3,
                "textown",
                "err\n",
            )
            assert await sandbox.read_file("c") == "own" and await sandbox.read_file("none") == ""
            with pytest.raises(RuntimeError, match="exit=7"):
                await sandbox.exec("exit 7", check=True)
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await sandbox.exec("sleep 30", timeout=0.2)
            assert time.monotonic() - started < 5
            await ensure_agent_user(sandbox, f"{sandbox.root}/work dir")
            assert (sandbox.root / "work dir").is_dir()
            return sandbox.root

    assert not asyncio.run(use()).exists()


def test_a_long_command_runs_detached_and_is_ended_when_its_time_is_up() -> None:
    async def use() -> None:
        async with LocalSandbox() as sandbox:
            code, out = await exec_and_wait(
                sandbox,
                cmd='echo "$WORD"; pwd; (exit 3)',
                env={"WORD": "it's"},
                workdir=str(sandbox.root),
                time_budget_sec=30,
                tag="t",
                want_output=True,
            )
            assert code == 3 and out.split() == ["it's", str(sandbox.root.resolve())]
            slow = "sleep 30; touch late"
            started = time.monotonic()
            code, _ = await exec_and_wait(
                sandbox, cmd=slow, workdir=str(sandbox.root), time_budget_sec=0.5, tag="slow"
            )
            assert code == -2 and time.monotonic() - started < 10
            _, processes, _ = await sandbox.exec("pgrep -f 'sleep 30; touch lat[e]' || true")
            assert processes == "" and not (sandbox.root / "late").exists()

    asyncio.run(use())


def test_the_package_of_e2b_is_asked_for_by_name() -> None:
    with pytest.raises(ConfigError, match="pip install e2b"):
        E2BSandbox("image")


@pytest.mark.parametrize(
    ("harness", "kind"), [(CLAUDE_CODE, AnthropicAdapter), (CODEX, OpenAIAdapter)]
)
def test_a_harness_runs_its_agent_against_the_adapter_and_every_token_is_kept(
    harness: BaseHarness, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine("fixed$")
    adapter = kind(tokenizer=Letters(), sglang_url=engine.url)
    handle = run_app_in_thread(adapter.app)

    async def use() -> tuple[int, list[Sample], str]:
        async with LocalSandbox() as sandbox:
            await sandbox.write_file(f"bin/{harness.command}", AGENT)  # type: ignore[attr-defined]
            await sandbox.exec("chmod +x bin/*", check=True)
            path = {"PATH": f"{sandbox.root}/bin:/usr/bin:/bin", "AGENT_EXIT": "5"}
            monkeypatch.setenv(harness.extra_envs_env, json.dumps(path))
            adapter.open_session("s")
            workdir = f"{sandbox.root}/work"
            code = await harness.run(
                sandbox,
                workdir=workdir,
                session_id="s",
                adapter_url=f"http://127.0.0.1:{handle.port}",
                time_budget_sec=60,
                prompt="mend it's bug",
            )
            printed = await sandbox.read_file(f"{workdir}/.harness/trajectory.jsonl")
            samples = await adapter.finish_session("s", base_sample=Sample(index=2))
            return code, samples, printed

    try:
        code, samples, printed = asyncio.run(use())
    finally:
        handle.stop()
        engine.handle.stop()
    assert code == 5, printed
    assert [sample.response for sample in samples] == ["fixed$"]
    assert "".join(map(chr, samples[0].tokens)) == "[]u:mend it's bug$a:fixed$"


def test_tarballs_that_are_not_there_are_asked_for_by_their_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWE_HOST_NODE_TARBALL", "/nowhere")
    with pytest.raises(ConfigError, match=r"SWE_HOST_NODE_TARBALL.*'/nowhere', which is no file"):
        asyncio.run(CLAUDE_CODE.install_cli(LocalSandbox()))
    monkeypatch.setenv(CODEX.extra_envs_env, "[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        CODEX.environment()


@pytest.mark.usefixtures("aliases_on")
def test_a_launch_script_starts_a_run_in_a_process_of_its_own() -> None:
    commands = importlib.import_module("slime.utils.external_utils.command_utils")
    order: list[str] = []
    commands.execute_train("--help", 8, "qwen3-4B", before_ray_job_submit=lambda: order.append("a"))
    assert order == ["a"]
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        commands.execute_train("--no-such-flag 1")
    assert commands.exec_command("echo hi", capture_output=True) == "hi\n"
    assert commands.create_run_id() != commands.create_run_id()[:3]
