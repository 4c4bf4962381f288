"""The prompt of a turn: recorded ids where the history goes on, new ids for what is new alone.

    sent:      messages the session knows | new messages
    prompt:    ids as they were sampled   | ids of what the template puts after them

What was sampled is never tokenised again. The recorded ids count only as long as the template would
still say the same of them: where it writes an old turn differently now (it drops the thoughts of
earlier turns, say), the prompt is the template's, and the history begins anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.router.messages import for_template
from dovetail.router.sessions.tree import Matches, Message, Session, Turn, deepest
from dovetail.router.tool_calls import parse_model_output
from dovetail.types.ports import Tokenizer

_PLACE = "\x1fturn\x1f"
"""Stands for the model's turn while the template is rendered."""


@dataclass(frozen=True)
class Prompt:
    """What the engine gets, and what of it is new."""

    parent: Turn | None
    context_ids: Sequence[int]
    """Ids after the parent's."""
    text: str
    """What was rendered after the parent's text."""
    asked: Sequence[Message] = ()
    """Messages after the parent's answer."""

    def ids(self) -> list[int]:
        """The whole prompt."""
        before = [] if self.parent is None else self.parent.ids()
        return [*before, *self.context_ids]


@dataclass(frozen=True)
class Template:
    """The model's chat template, with what a request shows it beside messages."""

    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] | None = None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The text of these messages."""
        return str(
            self.tokenizer.apply_chat_template(
                [for_template(message) for message in messages],
                tools=self.tools or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(self.options or {}),
            )
        )


def chat_prompt(
    session: Session,
    messages: Sequence[Message],
    template: Template,
    matches: Matches,
    *,
    rewritten: bool = False,
) -> Prompt:
    """The prompt for these messages.

    Args:
        matches: whether a message that was sent is the recorded one.
        rewritten: keep to the recorded ids also where the template would write them differently.

    Raises:
        Exception: whatever the template objects to.
    """
    turn = deepest(session, messages, matches)
    whole = template.render(messages)
    if turn is not None:
        place = _messages_until(turn)
        text = _added(turn, messages, place, whole, template, rewritten)
        if text is not None:
            body, tail = text
            ids = template.tokenizer.encode(_after(turn, tail), add_special_tokens=False)
            return Prompt(turn, ids, body + tail, messages[place:])
    return Prompt(None, template.tokenizer.encode(whole, add_special_tokens=False), whole, messages)


def text_prompt(session: Session, prompt: str | Sequence[int], tokenizer: Tokenizer) -> Prompt:
    """The prompt of a plain completion: it goes on where it begins with all that was recorded, the
    end of the model's turn included."""
    if isinstance(prompt, str):
        turn, end = _longest(session, lambda one, at: _text_end(one, at, prompt))
        rest = prompt[end:]
        return Prompt(turn, tokenizer.encode(rest, add_special_tokens=turn is None), rest)
    given = list(prompt)
    turn, end = _longest(session, lambda one, at: _ids_end(one, at, given))
    return Prompt(turn, given[end:], tokenizer.decode(given[end:], skip_special_tokens=False))


def _longest(
    session: Session, end_of: Callable[[Turn, int], int | None]
) -> tuple[Turn | None, int]:
    """The longest recorded completion that a prompt goes on, and where its rest begins."""
    best: tuple[Turn | None, int] = (None, 0)
    waiting = [(root, 0) for root in session.roots()]
    while waiting:
        turn, at = waiting.pop()
        end = end_of(turn, at) if turn.answer is None else None
        if end is None:
            continue
        best = (turn, end) if end > best[1] else best
        waiting += [(child, end) for child in turn.children]
    return best


def _text_end(turn: Turn, at: int, prompt: str) -> int | None:
    recorded = turn.text + turn.said
    return at + len(recorded) if prompt.startswith(recorded, at) else None


def _ids_end(turn: Turn, at: int, prompt: list[int]) -> int | None:
    recorded = [*turn.context_ids, *turn.output_ids]
    end = at + len(recorded)
    return end if prompt[at:end] == recorded else None


def _messages_until(turn: Turn) -> int:
    """Messages up to and with the turn's answer."""
    return sum(len(one.asked) + 1 for one in turn.path())


def _after(turn: Turn, tail: str) -> str:
    """The tail without the end of the turn, where the model sampled that itself."""
    return tail.removeprefix(turn.ending) if turn.ending else tail


def _added(
    turn: Turn,
    messages: Sequence[Message],
    place: int,
    whole: str,
    template: Template,
    rewritten: bool,
) -> tuple[str, str] | None:
    """How the template writes the turn, and what it puts after it; None: not as it was recorded."""
    before = turn.prompt_text()
    tail = _tail(messages, place, template)
    if rewritten:
        return None if tail is None else ("", tail)
    if not whole.startswith(before):
        return None
    if tail is None or not whole.endswith(tail) or len(before) + len(tail) > len(whole):
        tail = _tail_behind(turn, messages[:place], whole, template)
    if tail is None:
        return None
    body = whole[len(before) : len(whole) - len(tail)]
    return (body, tail) if _says(body, turn, template.tools) else None


def _tail(messages: Sequence[Message], place: int, template: Template) -> str | None:
    """What follows the model's words, by putting others in their place."""
    stand_in = {"role": "assistant", "content": _PLACE}
    try:
        rendered = template.render([*messages[: place - 1], stand_in, *messages[place:]])
    # Some templates take no answers of tools that nobody called.
    except Exception:
        return None
    _, found, tail = rendered.rpartition(_PLACE)
    return tail if found else None


def _tail_behind(
    turn: Turn, messages: Sequence[Message], whole: str, template: Template
) -> str | None:
    """The same from where the template ends the turn, if it writes it as the last one alike."""
    eos = template.tokenizer.eos_token_id
    ending = turn.ending or ("" if eos is None else template.tokenizer.decode([eos]))
    until = template.render(messages, generation_prompt=False)
    at = until.rfind(ending) if ending else -1
    return whole[at:] if at > 0 and whole.startswith(until) else None


def _says(body: str, turn: Turn, tools: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether the template's words for a turn are those that were sampled, but for their looks."""
    said = turn.said.removesuffix(turn.ending) if turn.ending else turn.said
    if body in (said, turn.shown):
        return True
    return _meaning(body, tools) == _meaning(turn.shown, tools)


def _meaning(text: str, tools: Sequence[Mapping[str, Any]] | None) -> tuple[Any, ...]:
    parsed = parse_model_output(text, tools=tools, reasoning_parser="any")
    calls = [
        (call["function"]["name"], json.dumps(call["function"]["arguments"], sort_keys=True))
        for call in parsed.tool_calls
    ]
    return parsed.reasoning, parsed.text.strip(), calls
