"""Who lives where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dovetail.config.sections.base import Section


class RuntimeConfig(Section):
    """Who lives where."""

    mode: Literal["local", "colocated", "disaggregated"] = Field(
        "local", description="local: one process, engine and trainer share tensors."
    )
