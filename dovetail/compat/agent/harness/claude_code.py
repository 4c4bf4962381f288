"""Claude Code in a sandbox, talking to an `AnthropicAdapter`."""

from __future__ import annotations

import json
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

_CLI_TARBALL_ENV = "SWE_HOST_CC_TARBALL"


class ClaudeCodeHarness(BaseHarness):
    """Runs `claude -p PROMPT` without asking for permissions: the sandbox is the wall."""

    name: ClassVar[str] = "claude_code"
    command: ClassVar[str] = "claude"
    launch_flags: ClassVar[str] = (
        "--permission-mode bypassPermissions --output-format stream-json --verbose"
    )
    extra_args_env: ClassVar[str] = "SLIME_AGENT_CC_EXTRA_ARGS"
    extra_envs_env: ClassVar[str] = "SLIME_AGENT_CC_EXTRA_ENVS"
    static_env: ClassVar[Mapping[str, str]] = {
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "NO_COLOR": "1",
    }

    async def install_cli(self, sb: Sandbox) -> None:
        """Install it from the tarballs on this machine that SWE_HOST_NODE_TARBALL and
        SWE_HOST_CC_TARBALL name.
        """
        await install_npm_cli(
            sb,
            node_runtime=host_file(NODE_TARBALL_ENV, "Node"),
            npm_package=host_file(_CLI_TARBALL_ENV, "Claude Code"),
            check_cmd=f"{self.command} --version",
        )

    async def write_config(self, sb: Sandbox, ctx: HarnessContext) -> None:
        """Settings beside the work, so that nothing is asked at the first start."""
        settings = json.dumps({"hasCompletedOnboarding": True, "permissions": {"deny": []}})
        await sb.write_file(f"{ctx.workdir}/.harness/claude.json", settings, user="agent")

    async def launch_and_wait(
        self, sb: Sandbox, ctx: HarnessContext, prompt: str, time_budget_sec: int
    ) -> int:
        """See `BaseHarness.launch_and_wait`."""
        env = self.environment(
            ANTHROPIC_BASE_URL=ctx.adapter_url,
            ANTHROPIC_AUTH_TOKEN=ctx.session_id,
            ANTHROPIC_MODEL=ctx.model_label,
            ANTHROPIC_SMALL_FAST_MODEL=ctx.model_label,
        )
        command = f"{self.command} -p {quoted(prompt)} {self.launch_flags}"
        return await run_agent(
            sb,
            workdir=ctx.workdir,
            start_cmd=self.with_extra_args(command),
            env=env,
            time_budget_sec=time_budget_sec,
        )


CLAUDE_CODE = ClaudeCodeHarness()
