"""Impossible combinations of agents and their sessions, and what does nothing without one.

As in `dovetail.config.check`, whose rules these are.
"""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig

_AGENT = "agent"
"""The generate function that runs agents, by its registered name."""


def agent_rules(config: RunConfig) -> Iterator[str]:
    """What can't be of agents."""
    hooks, own = config.hooks, config.session
    generate, agent = hooks.custom_generate_function_path, hooks.custom_agent_function_path
    # Without a server the hook is refused anyhow, for that.
    if agent is not None and generate is None and config.router.serve_router != "false":
        yield (
            f"custom_agent_function_path {agent} is not called: the built-in generate function "
            f"runs no agents; add {cure('custom_generate_function_path', _AGENT)}"
        )
    if generate == _AGENT and agent is None:
        yield (
            "custom_generate_function_path agent runs an agent, and none is named; add "
            f"{cure('custom_agent_function_path', 'PATH')}"
        )
    limit = hooks.generate_timeout_s
    if agent is not None and own.agent_timeout_s >= limit:
        yield (
            f"agent_timeout_s {own.agent_timeout_s:g} is not below generate_timeout_s {limit:g}, "
            "at which the whole group is given up: nothing would be left of a late agent; "
            f"use {cure('generate_timeout_s', f'{2 * own.agent_timeout_s:g}')}"
        )


def agent_notes(config: RunConfig) -> Iterator[str]:
    """One line for each setting without effect."""
    given = config.session.model_fields_set
    if "agent_timeout_s" in given and config.hooks.custom_agent_function_path is None:
        yield "agent_timeout_s does nothing: no agent is named (--custom-agent-function-path)"
    elif given and config.router.serve_router == "false":
        yield f"{', '.join(sorted(given))} does nothing with --serve-router false"
