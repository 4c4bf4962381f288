"""Other machines are served with a token only."""

from __future__ import annotations

import pytest

from dovetail.config.router_rules import router_rules
from dovetail.config.run import RunConfig


def _problems(**router: object) -> list[str]:
    return list(router_rules(RunConfig.model_validate({"router": router})))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert _problems(router_host=host) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_another_address_needs_a_token_and_says_how(host: str) -> None:
    (problem,) = _problems(router_host=host)
    assert "--router-token-env VARIABLE (TOML: router.router_token_env)" in problem
    assert "--router-host 127.0.0.1" in problem
    assert _problems(router_host=host, serve_router="false") == []


def test_the_variable_must_have_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTER_TOKEN", raising=False)
    (problem,) = _problems(router_host="0.0.0.0", router_token_env="ROUTER_TOKEN")
    assert "ROUTER_TOKEN, which is not set or empty" in problem
    monkeypatch.setenv("ROUTER_TOKEN", "x")
    assert _problems(router_host="0.0.0.0", router_token_env="ROUTER_TOKEN") == []
