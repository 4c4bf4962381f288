"""From the turns of a session to samples: exactly the tokens that were sampled are trained on.

    turn: prompt ids, output ids
      |-- the prompt begins with all ids of a strand ........ the strand goes on
      |-- it differs from them inside the last response ..... a short turn goes on without
      |                                                       training that response, a long one
      |                                                       begins a strand
      '-- anything else (a subagent, a retry, compaction) ... a strand begins

A strand becomes one sample. No token is trained twice, and none whose ids the client sent back
differently.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.router.sessions.strand import Strand, TurnRecord
from dovetail.types.sample import Sample

__all__ = ["FORK_THRESHOLD_TOKENS", "TrajectoryManager", "TurnRecord"]

FORK_THRESHOLD_TOKENS = 1024
"""A turn with fewer tokens than this does not begin a strand because of a drift."""
Message = Mapping[str, Any]


@dataclass
class _Strand(Strand):
    """Turns whose ids continue each other, and what was said in them."""

    asked: list[Message] = field(default_factory=list)
    """Messages of the last turn's prompt."""
    uses_tools: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def append(self, turn: TurnRecord, *, keep: int) -> None:
        """Go on with `turn`, whose prompt has the first `keep` ids of this strand."""
        self.cut(keep)
        self.observe(turn.prompt_ids[keep:])
        versions = () if turn.weight_version is None else (str(turn.weight_version),)
        self.sampled(turn.output_ids, turn.output_log_probs, versions, turn.finish_reason)

    def goes_on_in(self, turn: TurnRecord) -> bool:
        """Whether the prompt begins with every id of this strand."""
        return turn.prompt_ids[: len(self.tokens)] == self.tokens

    def shared_with(self, turn: TurnRecord) -> int:
        """How many first ids the prompt has in common with this strand."""
        size = 0
        for own, theirs in zip(self.tokens, turn.prompt_ids, strict=False):
            if own != theirs:
                break
            size += 1
        return size

    def is_answered_in(self, messages: Sequence[Message]) -> bool:
        """Whether these messages are those of the last prompt, an answer, and what follows it."""
        asked = len(self.asked)
        return (
            len(messages) > asked
            and list(messages[:asked]) == self.asked
            and messages[asked].get("role") == "assistant"
        )

    def to_sample(self, base: Sample, reward: Any) -> Sample:
        sample = Sample(
            group_index=base.group_index,
            index=base.index,
            rollout_id=base.index if base.rollout_id is None else base.rollout_id,
            prompt=base.prompt,
            label=base.label,
            reward=reward,
            session_id=base.session_id,
            custom_rm_path=base.custom_rm_path,
            train_metadata=base.train_metadata,
        )
        self.fill(sample)
        truncated = sample.status is Sample.Status.TRUNCATED
        facts = {"truncated": truncated, "use_tool": self.uses_tools}
        sample.metadata = {**base.metadata, **self.metadata, **facts}
        if hasattr(base, "trace"):
            sample.trace = base.trace  # type: ignore[attr-defined]
        return sample


class TrajectoryManager:
    """Turns of any number of sessions, recorded from any thread.

    Args:
        fork_threshold_tokens: a turn of at least this many tokens begins a new strand when its
            prompt differs from the strand inside the last response; with 0 every one does.

    Example:
        >>> manager = TrajectoryManager()
        >>> manager.record_turn("s", turn=TurnRecord([1, 2], [3], "stop", [-0.5]))
        >>> manager.record_turn("s", turn=TurnRecord([1, 2, 3, 4], [5], "stop", [-0.1]))
        >>> (sample,) = manager.get_trajectory("s", base_sample=Sample(index=0), reward=1.0)
        >>> sample.tokens, sample.loss_mask
        ([1, 2, 3, 4, 5], [1, 0, 1])
    """

    def __init__(self, fork_threshold_tokens: int | None = None) -> None:
        given = fork_threshold_tokens
        self.fork_threshold_tokens = FORK_THRESHOLD_TOKENS if given is None else given
        self._sessions: dict[str, list[_Strand]] = {}
        self._lock = threading.Lock()

    def record_turn(
        self,
        session_id: str,
        *,
        turn: TurnRecord,
        prompt_messages: Sequence[Message] = (),
        response_message: Message | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a turn to its session, which begins with its first one.

        Raises:
            ValueError: logprobs and output differ in length.
        """
        if turn.output_log_probs and len(turn.output_log_probs) != len(turn.output_ids):
            raise ValueError(
                f"{len(turn.output_ids)} output ids but {len(turn.output_log_probs)} logprobs"
            )
        with self._lock:
            strands = self._sessions.setdefault(session_id, [])
            strand, keep = self._place(strands, turn, prompt_messages)
            if strand is None:
                strand = _Strand(prompt_length=len(turn.prompt_ids))
                strands.append(strand)
            strand.append(turn, keep=keep)
            strand.asked = [dict(message) for message in prompt_messages]
            strand.uses_tools |= bool((response_message or {}).get("tool_calls"))
            strand.metadata |= dict(metadata or {})

    def _place(
        self, strands: list[_Strand], turn: TurnRecord, messages: Sequence[Message]
    ) -> tuple[_Strand | None, int]:
        """The strand that the turn goes on, and how much of it stays."""
        whole = [strand for strand in strands if strand.goes_on_in(turn)]
        if whole:
            longest = max(whole, key=lambda strand: len(strand.tokens))
            return longest, len(longest.tokens)
        if len(turn.output_ids) < self.fork_threshold_tokens:
            drifted = [
                strand
                for strand in strands
                if strand.is_answered_in(messages)
                and strand.shared_with(turn) >= strand.last_response
            ]
            if drifted:
                nearest = max(drifted, key=lambda strand: strand.shared_with(turn))
                return nearest, nearest.last_response
        return None, 0

    def get_trajectory(
        self, session_id: str, *, base_sample: Sample, reward: Any = None
    ) -> list[Sample]:
        """The session's samples, and forget it: one for each strand that has something to train.

        They share `rollout_id`, so a group counts them as one rollout, and each has the whole
        `reward`. Responses are not decoded.
        """
        with self._lock:
            strands = self._sessions.pop(session_id, [])
        return [strand.to_sample(base_sample, reward) for strand in strands if any(strand.mask)]

    def drop(self, session_id: str) -> None:
        """Forget a session."""
        with self._lock:
            self._sessions.pop(session_id, None)
