"""Sessions of agents: conversations that the router records token by token."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class SessionConfig(Section):
    """Sessions of agents: conversations that the router records token by token."""

    agent_timeout_s: float = Field(
        1500.0,
        gt=0,
        description=(
            "Seconds after which an agent is stopped; what its session recorded is trained on."
        ),
    )
    session_sampling: Literal["run", "client"] = Field(
        "run",
        description=(
            "Whose temperature, top-p and so on count in an agent's requests: the run's, whose "
            "logprobs are trained on, or the client's where it names them."
        ),
    )
    session_history: Literal["template", "recorded"] = Field(
        "template",
        description=(
            "What a turn goes on from: the recorded tokens as long as the chat template still says "
            "the same of them (another sample begins where it does not), or always the recorded "
            "ones."
        ),
    )
    session_split_thoughts: bool = Field(
        False,
        description="Answer agents what stands before </think> as reasoning_content.",
    )
    max_sessions: int = Field(
        100_000, ge=1, description="Most sessions at once; further ones get 503."
    )
    session_idle_s: float = Field(
        3600.0, gt=0, description="Seconds without a request after which a session is forgotten."
    )
    session_memory_gb: float = Field(
        4.0, gt=0, description="Most memory for what sessions record, in GB (1e9 bytes)."
    )
    session_max_turns: int = Field(4096, ge=1, description="Most turns of one session.")
