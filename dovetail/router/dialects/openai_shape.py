"""What a request of OpenAI's form wants made, and what the answers are to look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.router.wanted import Wanted
from dovetail.types import ScoreResult


@dataclass(frozen=True)
class Job:
    """One choice to make."""

    prompt: tuple[int, ...]
    wanted: Wanted
    rid: str


@dataclass(frozen=True)
class Scored:
    """What the engine found, looking again."""

    prompt: ScoreResult | None = None
    response: ScoreResult | None = None


@dataclass(frozen=True)
class Shape:
    """What the answers look like."""

    chat: bool
    logprobs: bool
    top: int = 0
    """Alternatives at each sampled token."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Calls of them are taken out of the text."""
    reasoning: bool = False
    """Thoughts are, too."""
    model: str = ""
    rid: str = ""
    created: int = 0
    usage: bool = False
    prompts: int = 1
    ids_as_text: bool = False
    """Tokens are told as `token_id:N`."""
    prompt_top: int | None = None
    """Alternatives at each token of the prompt; None: nothing is told of them."""

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The outer object."""
        kind = "chat.completion" + ".chunk" * chunk if self.chat else "text_completion"
        return {
            "id": self.rid,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
