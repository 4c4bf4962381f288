"""The engine behind HTTP, for functions that speak to one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from dovetail.config.sections.base import Section


class RouterConfig(Section):
    """The engine behind HTTP, for functions that speak to one."""

    serve_router: Literal["auto", "true", "false"] = Field(
        "auto",
        description=(
            "Serve the engine on this machine in the forms of SGLang, vLLM and OpenAI; auto: when "
            "a hook is written for another framework."
        ),
    )
    router_port: int = Field(0, ge=0, le=65535, description="Port of that server; 0: a free one.")
    router_host: str = Field(
        "127.0.0.1",
        description=(
            "Address that it listens on; any but this machine's own needs router_token_env."
        ),
    )
    router_token_env: str | None = Field(
        None,
        description=(
            "Environment variable with a token that clients must send (Authorization: Bearer), "
            "the run's own functions too."
        ),
    )
    join: str | None = Field(
        None,
        description=(
            "Address of a run's router: `dovetail serve` adds itself to its engines once it "
            "answers, and takes itself out before it ends."
        ),
    )
    router_policy: Literal[
        "round_robin", "least_loaded", "cache_aware", "consistent_hashing", "manual"
    ] = Field(
        "cache_aware",
        description=(
            "Which engine gets a request: in turn, the least busy, the one that has most of the "
            "prompt in its cache, or the one of the request's session (consistent_hashing, manual)."
        ),
    )
    router_request_timeout_s: float = Field(
        14400.0, gt=0, description="Longest time for one request, in seconds."
    )
    router_queue_size: int = Field(
        100_000,
        ge=0,
        description="Most requests that wait for an engine; further ones are told to come later.",
    )
    router_max_connections: int = Field(
        16_384, ge=1, description="Most connections at once; further ones get 503."
    )
    router_max_body_mb: float = Field(
        128.0, gt=0, description="Largest body of a request, in MB (1e6 bytes)."
    )
    router_health_check_failure_threshold: int = Field(
        3, ge=1, description="Looks in a row that must fail before an engine counts as dead."
    )

    @field_validator("serve_router", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """TOML has true and false of its own."""
        return str(value).lower() if isinstance(value, bool) else value
