"""Stand-ins for the tokenizer: that of the model by its file alone, else one of characters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dovetail.config.run import RunConfig
from dovetail.run.rehearse.verdict import NotInRehearsal

_SPECIAL = 3
_LARGEST = 0x10FFFF
_OF_THE_CALL = ("return_dict", "return_tensors", "truncation", "max_length", "padding")


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer in the model's directory, read without its model; characters without one."""
    path = config.model.hf_checkpoint
    return _read(path) if path is not None else CharacterTokenizer()


@cache
def _read(path: str) -> CharacterTokenizer:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return CharacterTokenizer()
    try:
        return FileTokenizer(file)
    # The run says what is wrong with a damaged file; here characters do.
    except Exception:
        return CharacterTokenizer()


class CharacterTokenizer:
    """One token per character: 0 pads, 1 ends, 2 begins."""

    pad_token_id, eos_token_id, bos_token_id, unk_token_id = 0, 1, 2, 0
    pad_token, eos_token, bos_token, unk_token = "<pad>", "<eos>", "<bos>", "<pad>"
    padding_side = "left"
    vocab_size = _LARGEST + _SPECIAL
    chat_template = "{{ messages }}"
    name_or_path = "characters"
    all_special_ids = (0, 1, 2)
    all_special_tokens = ("<pad>", "<eos>", "<bos>")

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: Any, **kwargs: Any) -> _Encoding:
        many = isinstance(text, list | tuple)
        ids = [self.encode(one) for one in text] if many else self.encode(text)
        mask = [[1] * len(one) for one in ids] if many else [1] * len(ids)  # type: ignore[arg-type]
        return _Encoding(input_ids=_tensors(ids, kwargs), attention_mask=_tensors(mask, kwargs))

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return [ord(letter) + _SPECIAL for letter in text]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(one) for one in token_ids]
        special = ("", "", "") if skip_special_tokens else self.all_special_tokens
        return "".join(
            special[one] if one < _SPECIAL else chr(min(one - _SPECIAL, _LARGEST)) for one in ids
        )

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        return [self.decode(one, **kwargs) for one in sequences]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, list | tuple):
            return [self.convert_tokens_to_ids(one) for one in tokens]
        if tokens in self.all_special_tokens:
            return self.all_special_tokens.index(tokens)
        return ord(tokens) + _SPECIAL if len(tokens) == 1 else self.unk_token_id

    def convert_ids_to_tokens(self, ids: Any, **_: Any) -> Any:
        return self.decode([ids]) if isinstance(ids, int) else [self.decode([one]) for one in ids]

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> Any:
        if conversation and isinstance(conversation[0], list | tuple):
            return [
                self.apply_chat_template(one, tools, tokenize, add_generation_prompt, **kwargs)
                for one in conversation
            ]
        given = {name: value for name, value in kwargs.items() if name not in _OF_THE_CALL}
        text = self._render(conversation, tools, add_generation_prompt, given)
        if not tokenize:
            return text
        ids = self.encode(text, add_special_tokens=False)
        return self(text, **kwargs) if kwargs.get("return_dict") else _tensors(ids, kwargs)

    def _render(self, conversation: Any, tools: Any, generation: bool, given: Any) -> str:
        text = "".join(f"<|{m['role']}|>{_content(m)}<|end|>" for m in conversation)
        text = (f"<|tools|>{tools}<|end|>" if tools else "") + text
        return text + ("<|assistant|>" if generation else "")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotInRehearsal(f"needs tokenizer.{name}, which the rehearsal's stand-in lacks")


class _Encoding(dict[str, Any]):
    """A dict whose entries are attributes too, as tokenizers give it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else str(content or "")


def _tensors(ids: Any, kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("return_tensors") != "pt":
        return ids
    import torch

    return torch.tensor(ids if ids and isinstance(ids[0], list) else [ids])


class FileTokenizer(CharacterTokenizer):
    """The ids of a `tokenizer.json`, with the names and the chat template beside it."""

    def __init__(self, file: Path) -> None:
        import tokenizers

        self._inner = tokenizers.Tokenizer.from_file(str(file))
        settings = file.with_name("tokenizer_config.json")
        known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        self.vocab_size = self._inner.get_vocab_size()
        self.eos_token = _name(known.get("eos_token")) or ""
        self.pad_token = _name(known.get("pad_token")) or self.eos_token
        self.bos_token = _name(known.get("bos_token")) or ""
        self.eos_token_id = self._inner.token_to_id(self.eos_token) or 0
        self.pad_token_id = self._inner.token_to_id(self.pad_token) or 0
        self.name_or_path = str(file.parent)
        template = file.with_name("chat_template.jinja")
        text = template.read_text(encoding="utf-8") if template.is_file() else None
        self.chat_template = text or known.get("chat_template") or ""

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        try:
            return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:
            if "UNK" not in str(error):
                raise
            # The rehearsal's texts are not the run's: a vocabulary may lack their characters.
            known = [self._inner.token_to_id(letter) for letter in text]
            return [
                ord(c) % self.vocab_size if i is None else i
                for c, i in zip(text, known, strict=True)
            ]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(one) for one in token_ids]
        return str(self._inner.decode(ids, skip_special_tokens=skip_special_tokens))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, list | tuple):
            return [self.convert_tokens_to_ids(one) for one in tokens]
        return self._inner.token_to_id(tokens)

    def convert_ids_to_tokens(self, ids: Any, **_: Any) -> Any:
        one = self._inner.id_to_token
        return one(ids) if isinstance(ids, int) else [one(number) for number in ids]

    def _render(self, conversation: Any, tools: Any, generation: bool, given: Any) -> str:
        if not isinstance(self.chat_template, str) or not self.chat_template:
            return super()._render(conversation, tools, generation, given)
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        return environment.from_string(self.chat_template).render(
            messages=conversation,
            tools=tools,
            add_generation_prompt=generation,
            eos_token=self.eos_token,
            bos_token=self.bos_token,
            pad_token=self.pad_token,
            raise_exception=_refuse,
            strftime_now=lambda _: "2025-01-01",
            **given,
        )


def _refuse(message: str) -> None:
    raise ValueError(message)


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token
