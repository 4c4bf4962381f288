"""Codex in a sandbox, talking to an `OpenAIAdapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dovetail.compat.agent.harness.common import (
    NODE_TARBALL_ENV,
    BaseHarness,
    HarnessContext,
    host_file,
    install_npm_cli,
    quoted,
    run_agent,
)
from dovetail.compat.agent.sandbox import Sandbox

_CLI_TARBALL_ENV = "SWE_HOST_CODEX_TARBALL"
_CONFIG = """\
model = "{model}"
model_provider = "adapter"

[model_providers.adapter]
name = "adapter"
base_url = "{url}/v1"
env_key = "OPENAI_API_KEY"
wire_api = "chat"
"""


class CodexHarness(BaseHarness):
    """Runs `codex exec PROMPT` without asking for approval: the sandbox is the wall."""

    name: ClassVar[str] = "codex"
    command: ClassVar[str] = "codex"
    launch_flags: ClassVar[str] = (
        "--dangerously-bypass-approvals-and-sandbox --skip-git-repo-check --json"
    )
    extra_args_env: ClassVar[str] = "SLIME_AGENT_CODEX_EXTRA_ARGS"
    extra_envs_env: ClassVar[str] = "SLIME_AGENT_CODEX_EXTRA_ENVS"
    static_env: ClassVar[Mapping[str, str]] = {"NO_COLOR": "1"}

    async def install_cli(self, sb: Sandbox) -> None:
        """Install it from the tarballs on this machine that SWE_HOST_NODE_TARBALL and
        SWE_HOST_CODEX_TARBALL name.
        """
        await install_npm_cli(
            sb,
            node_runtime=host_file(NODE_TARBALL_ENV, "Node"),
            npm_package=host_file(_CLI_TARBALL_ENV, "Codex"),
            check_cmd=f"{self.command} --version",
        )

    async def write_config(self, sb: Sandbox, ctx: HarnessContext) -> None:
        """Codex reads its provider from a file."""
        text = _CONFIG.format(model=ctx.model_label, url=ctx.adapter_url)
        await sb.write_file(f"{ctx.workdir}/.harness/codex/config.toml", text, user="agent")

    async def launch_and_wait(
        self, sb: Sandbox, ctx: HarnessContext, prompt: str, time_budget_sec: int
    ) -> int:
        """See `BaseHarness.launch_and_wait`."""
        env = self.environment(
            CODEX_HOME=f"{ctx.workdir}/.harness/codex",
            OPENAI_API_KEY=ctx.session_id,
            OPENAI_BASE_URL=f"{ctx.adapter_url}/v1",
        )
        command = f"{self.command} exec {self.launch_flags} {quoted(prompt)}"
        return await run_agent(
            sb,
            workdir=ctx.workdir,
            start_cmd=self.with_extra_args(command),
            env=env,
            time_budget_sec=time_budget_sec,
        )


CODEX = CodexHarness()
