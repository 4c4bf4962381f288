"""Which tokens of a conversation the assistant said: what supervised training learns from.

    messages --chat template--> text --spans of the assistant--> tokens with a mask

The template is the only source: a span is what a message adds to the rendering of those before it.
Templates that write an earlier turn differently once another follows (Qwen3 drops its thoughts)
have no such prefixes; there the spans lie between the marks with which the template opens and
closes a turn of the assistant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from dovetail.types.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]
"""From character to character, the end not included."""

TYPES = ("qwen", "qwen3", "qwen3_5", "distill_qwen", "gemma4")
"""Kinds of `loss_mask_type`. Only distill_qwen differs: it takes the last message as it stands,
thoughts included, which its template would drop."""
_PROBE = "xqzanswerzqx"
_QUESTION: Message = {"role": "user", "content": "xqzquestionzqx"}


class MultiTurnLossMaskGenerator:
    """Token ids and loss mask of conversations.

    Trained is what the assistant says, with the tokens that end its turn and without those that
    open it. A message with `"step_loss_mask": 0` is not trained.

    Example:
        >>> make = MultiTurnLossMaskGenerator(tokenizer)
        >>> token_ids, loss_mask = make.get_loss_mask(
        ...     [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
        ... )
    """

    def __init__(
        self,
        tokenizer: Any,
        tokenizer_type: str = "qwen",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer_type not in TYPES:
            raise ValueError(
                f"loss mask type {tokenizer_type!r}, expected one of {', '.join(TYPES)} "
                "(--loss-mask-type)"
            )
        self.tokenizer, self.tokenizer_type = tokenizer, tokenizer_type
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def get_loss_mask(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of the whole conversation, and 1 for each that the assistant said.

        Raises:
            DataError: the template does not show which part of its text the assistant said.
        """
        if self.tokenizer_type == "distill_qwen":
            return self.gen_multi_turn_loss_mask_distill_qwen(messages, tools)
        return self._by_template(messages, tools)

    def gen_multi_turn_loss_mask_qwen(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """As `get_loss_mask` does for every type but distill_qwen."""
        return self._by_template(messages, tools)

    gen_multi_turn_loss_mask_qwen3 = gen_multi_turn_loss_mask_qwen
    gen_multi_turn_loss_mask_qwen3_5 = gen_multi_turn_loss_mask_qwen
    gen_multi_turn_loss_mask_gemma4 = gen_multi_turn_loss_mask_qwen

    def gen_multi_turn_loss_mask_distill_qwen(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """The last message as it stands, after the prompt that the others make."""
        *before, last = messages
        prompt_ids = self._encode(self._render(before, tools, generate=True))
        response_ids = self._encode(last["content"])
        trained = int(last.get("step_loss_mask", 1) == 1)
        return prompt_ids + response_ids, [0] * len(prompt_ids) + [trained] * len(response_ids)

    def get_loss_mask_with_multimodal_alignment(
        self,
        messages: Sequence[Message],
        input_ids: Sequence[int],
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[int]]:
        """The mask for `input_ids` that a processor made of the same messages: the tokens that it
        put in for media are not trained.

        Raises:
            DataError: the text in `input_ids` is not that of the messages.
        """
        text_ids, text_mask = self.get_loss_mask([_text_only(m) for m in messages], tools)
        mask, place = [0] * len(input_ids), 0
        for number, token in enumerate(input_ids):
            if place < len(text_ids) and token == text_ids[place]:
                mask[number] = text_mask[place]
                place += 1
        if place < len(text_ids):
            raise DataError(
                f"the processor's {len(input_ids)} tokens do not hold the {len(text_ids)} tokens "
                f"of the conversation's text: token {place} of it is missing"
            )
        return list(input_ids), mask

    def get_response_lengths(self, loss_masks: Iterable[Sequence[int]]) -> list[int]:
        """See `get_response_lengths`."""
        return get_response_lengths(loss_masks)

    def get_text_from_loss_mask(
        self, token_ids: Sequence[int], loss_masks: Sequence[int]
    ) -> list[str]:
        """The text of each stretch of trained tokens."""
        texts, part = [], []
        for token, trained in zip([*token_ids, -1], [*loss_masks, 0], strict=True):
            if trained:
                part.append(token)
            elif part:
                texts.append(str(self.tokenizer.decode(part)))
                part = []
        return texts

    def find_all_sublist_indices(
        self, main_list: Sequence[int], sublist: Sequence[int]
    ) -> list[int]:
        """Where `sublist` stands in `main_list`."""
        wanted, size = list(sublist), len(sublist)
        return [
            place
            for place in range(len(main_list) - size + 1)
            if list(main_list[place : place + size]) == wanted
        ]

    def get_system_message_length(self) -> tuple[int, int]:
        """Tokens that the template puts before a conversation that has no system message, and
        tokens that open a turn of the assistant.
        """
        return self.system_message_length, self.gen_token_length

    @cached_property
    def system_message_length(self) -> int:
        """Tokens before the first message; 0 where the template refuses two questions in a row."""
        one = self._try_render([_QUESTION])
        two = self._try_render([_QUESTION, _QUESTION])
        if one is None or two is None:
            return 0
        return 2 * len(self._encode(one)) - len(self._encode(two))

    @cached_property
    def gen_token_length(self) -> int:
        """Tokens with which a turn of the assistant is asked for."""
        return len(self._encode(self._generation_prompt))

    def _by_template(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[list[int], list[int]]:
        text = self._render(messages, tools)
        said = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        spans = self._by_prefixes(text, messages, said, tools) or self._by_marks(text, said)
        if spans is None:
            raise DataError(
                f"the chat template does not show which of its text is said in the {len(said)} "
                "messages of the assistant; give the tokenizer a template that writes a turn the "
                "same way wherever it stands (--chat-template-path)"
            )
        trained = [
            span
            for i, span in zip(said, spans, strict=True)
            if messages[i].get("step_loss_mask", 1) == 1
        ]
        return self._masked(text, trained)

    def _by_prefixes(
        self,
        text: str,
        messages: Sequence[Message],
        said: Sequence[int],
        tools: Sequence[Any] | None,
    ) -> list[Span] | None:
        spans = []
        for i in said:
            before = self._try_render(messages[:i], tools) if i else ""
            upto = self._try_render(messages[: i + 1], tools)
            if before is None or upto is None:
                return None
            if not (upto.startswith(before) and text.startswith(upto)):
                return None
            opening = _shared_start(upto[len(before) :], self._opening)
            spans.append((len(before) + len(opening), len(upto)))
        return spans

    def _by_marks(self, text: str, said: Sequence[int]) -> list[Span] | None:
        opening = next((o for o in _by_lines(self._opening) if text.count(o) == len(said)), None)
        if opening is None or not self._closing:
            return None
        spans, end = [], 0
        for _ in said:
            start = text.index(opening, end)
            start += len(_shared_start(text[start:], self._opening))
            end = text.find(self._closing, start) + len(self._closing)
            if end < start:
                return None
            spans.append((start, end))
        return spans

    @cached_property
    def _generation_prompt(self) -> str:
        asked = self._render([_QUESTION], None)
        return self._render([_QUESTION], None, generate=True)[len(asked) :]

    @cached_property
    def _answered(self) -> str:
        """What a turn of the assistant adds to a question."""
        answer = {"role": "assistant", "content": _PROBE}
        asked = self._render([_QUESTION], None)
        return self._render([_QUESTION, answer], None)[len(asked) :]

    @cached_property
    def _opening(self) -> str:
        return _shared_start(self._generation_prompt, self._answered)

    @cached_property
    def _closing(self) -> str:
        return self._answered.rpartition(_PROBE)[2]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, generate: bool = False
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generate,
                **self.chat_template_kwargs,
            )
        )

    def _try_render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> str | None:
        try:
            return self._render(messages, tools)
        # A template may refuse a part of a conversation, in whatever way its author liked.
        except Exception:
            return None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _masked(self, text: str, trained: Sequence[Span]) -> tuple[list[int], list[int]]:
        if not getattr(self.tokenizer, "is_fast", False):
            return self._masked_in_pieces(text, trained)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [0] * len(encoded["input_ids"])
        spans = iter(trained)
        span = next(spans, None)
        for number, (start, _) in enumerate(encoded["offset_mapping"]):
            while span is not None and start >= span[1]:
                span = next(spans, None)
            mask[number] = int(span is not None and start >= span[0])
        return list(encoded["input_ids"]), mask

    def _masked_in_pieces(self, text: str, trained: Sequence[Span]) -> tuple[list[int], list[int]]:
        """For a tokenizer that does not say which characters a token stands for."""
        token_ids: list[int] = []
        mask: list[int] = []
        place = 0
        for start, end in [*trained, (len(text), len(text))]:
            for piece, value in ((text[place:start], 0), (text[start:end], 1)):
                piece_ids = self._encode(piece) if piece else []
                token_ids += piece_ids
                mask += [value] * len(piece_ids)
            place = end
        return token_ids, mask


def get_response_lengths(loss_masks: Iterable[Sequence[int]]) -> list[int]:
    """Of each mask, the tokens from the first trained one on; 0 without any."""
    return [len(mask) - list(mask).index(1) if 1 in mask else 0 for mask in loss_masks]


def _by_lines(text: str) -> list[str]:
    """The text, without its last line, without its last two, ..."""
    lines = text.splitlines(keepends=True)
    return ["".join(lines[:count]) for count in range(len(lines), 0, -1)]


def _shared_start(one: str, other: str) -> str:
    size = 0
    for letter, other_letter in zip(one, other, strict=False):
        if letter != other_letter:
            break
        size += 1
    return one[:size]


def _text_only(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part for part in content if part.get("type") == "text"]
    return {**message, "content": texts}
