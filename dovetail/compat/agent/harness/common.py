"""What harnesses share: install a command-line agent, point it at an adapter, run it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dovetail.compat.agent.sandbox import (
    Sandbox,
    ensure_agent_user,
    exec_and_wait,
)
from dovetail.types.errors import ConfigError

NODE_TARBALL_ENV = "SWE_HOST_NODE_TARBALL"
"""Environment variable with the path of a Node tarball, as the family's examples set it."""


@dataclass(frozen=True)
class HarnessContext:
    """Where an agent works and whom it talks to."""

    workdir: str
    session_id: str
    """Also its API key."""
    adapter_url: str
    model_label: str = "policy"


class BaseHarness:
    """A command-line agent. Subclasses say how it is installed, configured and launched."""

    name: ClassVar[str] = ""
    static_env: ClassVar[Mapping[str, str]] = {}
    extra_args_env: ClassVar[str] = ""
    """Environment variable with more arguments for the command."""
    extra_envs_env: ClassVar[str] = ""
    """Environment variable with a JSON object of more environment variables."""

    async def install_cli(self, sb: Sandbox) -> None:
        """Put the command into the sandbox."""
        raise NotImplementedError

    async def write_config(self, sb: Sandbox, ctx: HarnessContext) -> None:
        """Write the files that the command reads."""

    async def launch_and_wait(
        self, sb: Sandbox, ctx: HarnessContext, prompt: str, time_budget_sec: int
    ) -> int:
        """Run the command on `prompt`: its exit code, or -2 when the time is up."""
        raise NotImplementedError

    async def run(
        self,
        sb: Sandbox,
        *,
        workdir: str,
        session_id: str,
        adapter_url: str,
        time_budget_sec: int,
        prompt: str,
    ) -> int:
        """Configure, launch and wait."""
        await ensure_agent_user(sb, workdir)
        ctx = HarnessContext(workdir, session_id, adapter_url)
        await self.write_config(sb, ctx)
        return await self.launch_and_wait(sb, ctx, prompt, time_budget_sec)

    def with_extra_args(self, command: str) -> str:
        """The command with what `extra_args_env` adds."""
        extra = os.environ.get(self.extra_args_env, "").strip() if self.extra_args_env else ""
        return f"{command} {extra}" if extra else command

    def environment(self, **own: str) -> dict[str, str]:
        """`own`, over what every launch has, under what `extra_envs_env` adds.

        Raises:
            ConfigError: that variable is no JSON object.
        """
        text = os.environ.get(self.extra_envs_env, "").strip() if self.extra_envs_env else ""
        try:
            extra: Any = json.loads(text or "{}")
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise ConfigError(
                f"the environment variable {self.extra_envs_env} is {text!r:.80}, expected a JSON "
                "object of names and values"
            )
        return {**self.static_env, **own, **{name: str(value) for name, value in extra.items()}}


async def run_agent(
    sb: Sandbox, *, workdir: str, start_cmd: str, env: Mapping[str, str], time_budget_sec: int
) -> int:
    """Run an agent's command to its end; what it prints is in `.harness/trajectory.jsonl` of
    `workdir`.
    """
    code, _ = await exec_and_wait(
        sb,
        cmd=start_cmd,
        user="agent",
        env=env,
        workdir=workdir,
        out_file=f"{workdir}/.harness/trajectory.jsonl",
        time_budget_sec=time_budget_sec,
        tag="run",
    )
    return code


run_command = run_agent


def host_file(variable: str, what: str) -> Path:
    """The file on this machine that an environment variable names.

    Raises:
        ConfigError: it is not set, or there is no such file.
    """
    path = os.environ.get(variable, "")
    if not path or not Path(path).is_file():
        raise ConfigError(
            f"{what} is installed from a file on this machine: set the environment variable "
            f"{variable} to its path" + (f" (it is {path!r}, which is no file)" if path else "")
        )
    return Path(path)


async def install_npm_cli(
    sb: Sandbox, *, node_runtime: Path, npm_package: Path, check_cmd: str
) -> None:
    """Install Node from a tarball, then an npm package from another, and see that it runs.

    Raises:
        RuntimeError: a command failed in the sandbox.
    """
    await sb.write_file("/tmp/node.tar.xz", node_runtime)
    await sb.write_file("/tmp/harness-cli.tgz", npm_package)
    unpack = "mkdir -p /usr/local && tar -xf /tmp/node.tar.xz -C /usr/local --strip-components=1"
    await sb.exec(unpack, user="root", check=True, timeout=300)
    install = "npm install -g --offline /tmp/harness-cli.tgz || npm install -g /tmp/harness-cli.tgz"
    await sb.exec(install, user="root", check=True, timeout=600)
    await sb.exec(check_cmd, user="root", check=True, timeout=60)


def quoted(text: str) -> str:
    """For a shell."""
    return shlex.quote(text)
