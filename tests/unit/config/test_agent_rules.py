"""Agents and their sessions: what can't be, and what does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.config.agent_rules import agent_notes, agent_rules
from dovetail.config.run import RunConfig


def _config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(sections)


AGENT = {"custom_agent_function_path": "a:b"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"hooks": AGENT}, "--custom-generate-function-path agent"),
        ({"hooks": {"custom_generate_function_path": "agent"}}, "--custom-agent-function-path"),
        (
            {
                "hooks": {**AGENT, "custom_generate_function_path": "agent"},
                "session": {"agent_timeout_s": 1800},
            },
            "--generate-timeout-s 3600",
        ),
    ],
)
def test_what_cannot_be_is_told_with_its_cure(sections: dict[str, Any], said: str) -> None:
    (problem,) = agent_rules(_config(**sections))
    assert said in problem


def test_an_agent_with_its_generate_function_or_one_of_the_users_is_fine() -> None:
    for generate in ("agent", "my.module.generate"):
        hooks = {**AGENT, "custom_generate_function_path": generate}
        assert list(agent_rules(_config(hooks=hooks))) == []


def test_settings_without_effect_are_told() -> None:
    (note,) = agent_notes(_config(session={"agent_timeout_s": 3}))
    assert "no agent is named" in note
    served = {"session": {"max_sessions": 3}, "router": {"serve_router": "false"}}
    (note,) = agent_notes(_config(**served))
    assert "max_sessions does nothing" in note
    assert list(agent_notes(_config(session={"max_sessions": 3}))) == []
