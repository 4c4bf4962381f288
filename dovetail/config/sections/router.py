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
    router_port: int = Field(
        0, ge=0, le=65535, description="Port of that server on 127.0.0.1; 0: a free one."
    )

    @field_validator("serve_router", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """TOML has true and false of its own."""
        return str(value).lower() if isinstance(value, bool) else value
