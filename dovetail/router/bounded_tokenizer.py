"""A tokenizer for strangers' texts: what can never fit the context is not encoded.

Encoding 100 MB takes minutes, and nobody else is served meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.router.fields import RequestError
from dovetail.types.ports import Tokenizer

_SETTINGS = frozenset(
    {
        "conversation",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Of the tokenizer's method, which no template reads. With some of them a few bytes ask for a list
of any length."""
_FEW = 4
"""Tokens of so many characters are in every vocabulary: shorter texts need no closer look."""
_UNKNOWN = 1024
"""Longest token of a tokenizer that does not tell its words."""


class BoundedTokenizer:
    """Implements `types.ports.Tokenizer`.

    Args:
        tokenizer: the model's.
        most_tokens: of a prompt; None: no bound.
    """

    def __init__(self, tokenizer: Tokenizer, most_tokens: int | None) -> None:
        self._tokenizer, self._most_tokens = tokenizer, most_tokens
        self.eos_token_id, self.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.decode = tokenizer.decode
        self._longest: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As the tokenizer does.

        Raises:
            RequestError: the text is longer than a prompt of the longest tokens.
        """
        self._check(len(text))
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, conversation: Any, *, chat_template: None = None, **settings: Any
    ) -> Any:
        """As the tokenizer does, with the model's own template.

        Raises:
            RequestError: as `encode`, of everything that is shown to the template; or a setting is
                none of its variables.
        """
        if chat_template is not None:
            # A template is a program, and may have no end.
            raise RequestError(
                "chat_template: got a template, expected none: the model's own is used",
                field="chat_template",
                expected="null",
            )
        odd = sorted(_SETTINGS.intersection(settings))
        if odd:
            raise RequestError(
                f"chat_template_kwargs: got {', '.join(odd)}, expected variables of the template",
                field="chat_template_kwargs",
                got=", ".join(odd),
                expected="variables of the model's chat template",
            )
        self._check(_size([conversation, settings]))
        return self._tokenizer.apply_chat_template(conversation, **settings)

    def _check(self, characters: int) -> None:
        if self._most_tokens is None or characters <= self._most_tokens * _FEW:
            return
        most = self._most_tokens * self._longest_token()
        if characters > most:
            raise RequestError(
                f"the prompt has {characters} characters, and the {self._most_tokens} tokens of "
                f"the context hold {most} at most",
                field="prompt",
                got=f"{characters} characters",
                expected=f"at most {most}",
            )

    def _longest_token(self) -> int:
        if self._longest is None:
            words: Mapping[str, int] = getattr(self._tokenizer, "get_vocab", dict)()
            self._longest = max(map(len, words), default=_UNKNOWN)
        return self._longest


def _size(value: Any) -> int:
    """Characters of all texts in it; what is no text counts as one."""
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += [*one, *one.values()]
        elif isinstance(one, Sequence):
            waiting += one
        else:
            size += 1
    return size
