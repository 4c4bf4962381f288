"""One agent's conversation: every turn with its exact ids, as a tree.

    root: messages, prompt ids -> sampled ids
      '-- new messages, their ids -> sampled ids       the conversation goes on
            |-- ... -> sampled ids                     a turn that was asked for again,
            '-- ... -> sampled ids                     or several that were asked for at once
    root: a history that is none of these              a subagent, a compaction, a rewritten past

A turn keeps what it adds to its parent's, so a conversation costs its length once.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.types import SamplingParams

Message = Mapping[str, Any]

_BYTES_OF_TURN = 2048
_BYTES_PER_TOKEN = 16
"""An id and a logprob, and a little."""


@dataclass(eq=False, kw_only=True)
class Turn:
    """One answered request."""

    number: int
    """Turns of the session before it."""
    parent: Turn | None
    asked: list[Message]
    """Messages after the parent's answer; of a root all. Empty for plain completions."""
    answer: Message | None
    """None for a plain completion."""
    text: str
    """What was rendered after the parent's `text`s; of a root the whole prompt."""
    said: str
    """The sampled ids as text, special tokens included."""
    shown: str
    """The part of it that the client got, calls and thoughts included."""
    ending: str
    """The special token that ended it, as text; empty where none did."""
    context_ids: array[int]
    """Ids after the parent's, which nobody sampled; of a root the prompt."""
    output_ids: array[int]
    logprobs: array[float]
    """The engine's, one per output id."""
    weight_versions: list[str]
    """Of each segment of the output."""
    finish_reason: str
    response_id: str
    """What the client knows the answer by."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    made_at: float = 0.0
    routed_experts: Any = None
    """Of the whole sequence that ends here; only leaves keep them."""
    children: list[Turn] = field(default_factory=list)
    siblings: list[Turn] = field(default_factory=list)
    """Turns of the same history, this one included."""
    start: int = 0
    """Ids of the whole sequence before the output."""

    def __post_init__(self) -> None:
        before = 0 if self.parent is None else self.parent.end
        self.start = before + len(self.context_ids)

    @property
    def end(self) -> int:
        """Ids of the whole sequence, output included."""
        return self.start + len(self.output_ids)

    def path(self) -> list[Turn]:
        """From the root to this turn."""
        turns, turn = [], self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent  # type: ignore[assignment]
        return turns[::-1]

    def ids(self) -> list[int]:
        """The whole sequence."""
        found: list[int] = []
        for turn in self.path():
            found += turn.context_ids
            found += turn.output_ids
        return found

    def prompt_text(self) -> str:
        """What was rendered for this turn, from the beginning."""
        return "".join(turn.text for turn in self.path())

    @property
    def size_bytes(self) -> int:
        """About what it takes in memory."""
        said = sum(len(repr(message)) for message in self.asked)
        tokens = len(self.context_ids) + len(self.output_ids)
        texts = len(self.text) + 3 * len(self.said)
        experts = getattr(self.routed_experts, "nbytes", 0)
        return _BYTES_OF_TURN + _BYTES_PER_TOKEN * tokens + texts + said + experts


@dataclass(eq=False, kw_only=True)
class Session:
    """One agent's run against the engine."""

    session_id: str
    sampling: SamplingParams | None = None
    """What the run samples with; None: each request says for itself."""
    max_context_len: int | None = None
    """Most tokens of prompt plus response; None: what the engine takes."""
    evaluation: bool = False
    turns: list[Turn] = field(default_factory=list)
    """In the order in which they were answered."""
    asked: int = 0
    """Requests so far, answered or not."""
    full: bool = False
    """A request was refused because the context has no more room."""
    aborted: bool = False
    """The engine was told to end what it generates for it."""
    closed: bool = False
    """No request is taken any more, and none is recorded."""
    busy_s: float = 0.0
    """Time in which one of its requests at least was under way."""
    size_bytes: int = 1024
    made_at: float = field(default_factory=time.time)
    used_at: float = field(default_factory=time.monotonic)
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)
    _busy_since: float = 0.0
    _roots: list[Turn] = field(default_factory=list)

    def roots(self) -> list[Turn]:
        """Where histories begin."""
        return self._roots

    def leaves(self) -> list[Turn]:
        """Where they end, in the order in which they were answered."""
        return [turn for turn in self.turns if not turn.children]

    def enter(self, task: asyncio.Task[Any]) -> None:
        """A request of it is under way."""
        self.asked += 1
        if not self.in_flight:
            self._busy_since = time.monotonic()
        self.in_flight.add(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        """A request of it is over."""
        self.in_flight.discard(task)
        self.used_at = time.monotonic()
        if not self.in_flight:
            self.busy_s += self.used_at - self._busy_since

    def record(self, turn: Turn) -> None:
        """Add a turn."""
        parent = turn.parent
        if parent is not None:
            parent.children.append(turn)
            self.size_bytes -= getattr(parent.routed_experts, "nbytes", 0)
            # The child's are those of the whole sequence.
            parent.routed_experts = None
            turn.siblings = parent.children
        else:
            self._roots.append(turn)
            turn.siblings = self._roots
        self.turns.append(turn)
        self.size_bytes += turn.size_bytes


Matches = Callable[[Message, Message], bool]
"""Whether a message that a client sent back is the recorded one: `(recorded, sent)`."""


def deepest(session: Session, messages: Sequence[Message], matches: Matches) -> Turn | None:
    """The longest recorded history that these messages continue; of equal ones the newest."""
    best: tuple[int, Turn] | None = None
    waiting = [(root, 0) for root in session.roots()]
    while waiting:
        turn, place = waiting.pop()
        end = _end_of(turn, place, messages, matches)
        if end is None:
            continue
        if best is None or (end, turn.number) > (best[0], best[1].number):
            best = (end, turn)
        waiting += [(child, end) for child in turn.children]
    return None if best is None else best[1]


def _end_of(turn: Turn, place: int, messages: Sequence[Message], matches: Matches) -> int | None:
    """Where the turn's answer ends among the messages; None: they are others, or end with it."""
    end = place + len(turn.asked) + 1
    if turn.answer is None or len(messages) <= end:
        return None
    recorded = [*turn.asked, turn.answer]
    same = all(matches(*pair) for pair in zip(recorded, messages[place:end], strict=True))
    return end if same else None
