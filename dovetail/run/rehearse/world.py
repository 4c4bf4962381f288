"""Stand-ins: a tokenizer of characters, an engine with written answers, a source of few prompts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.run.rehearse.verdict import NotInRehearsal
from dovetail.types import FinishReason, GenerateRequest, GenerateResult
from dovetail.types.calls import VersionSpan

_SPECIAL = 3
_LARGEST = 0x10FFFF


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
        text = "".join(f"<|{m['role']}|>{_content(m)}<|end|>" for m in conversation)
        text = (f"<|tools|>{tools}<|end|>" if tools else "") + text
        text += "<|assistant|>" if add_generation_prompt else ""
        if not tokenize:
            return text
        ids = self.encode(text)
        return self(text, **kwargs) if kwargs.get("return_dict") else _tensors(ids, kwargs)

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


class WrittenEngine:
    """Answers in turn what is written, token by token, with logprobs and a version.

    An answer that does not fit `max_new_tokens` is cut and ends by length.
    """

    def __init__(self, tokenizer: CharacterTokenizer, answers: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self._answers = itertools.cycle(answers)
        self.num_calls = 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """The next answer."""
        if not isinstance(request, GenerateRequest):
            raise TypeError(
                f"engine.generate takes a GenerateRequest, got {type(request).__name__}"
            )
        self.num_calls += 1
        await asyncio.sleep(0)
        ids = [*self.tokenizer.encode(next(self._answers)), self.tokenizer.eos_token_id]
        cut = ids[: max(0, request.sampling.max_new_tokens)]
        whole = len(cut) == len(ids)
        return GenerateResult(
            request_id=request.request_id,
            token_ids=cut,
            logprobs=[-0.5 - 0.01 * (i % 7) for i in range(len(cut))],
            finish_reason=FinishReason.STOP if whole else FinishReason.LENGTH,
            text=self.tokenizer.decode(cut, skip_special_tokens=True),
            version_spans=(VersionSpan(0, 0, len(cut)),),
            prompt_tokens=len(request.prompt_ids),
        )

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Nothing runs long enough to be ended."""

    async def close(self) -> None:
        """Nothing is held."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotInRehearsal(f"needs engine.{name}, which the rehearsal's stand-in lacks")


class AlternatingScorer:
    """Rewards 1 and 0 in turn."""

    def __init__(self, reward_key: str | None) -> None:
        self._reward_key, self._turn = reward_key, itertools.count(1)

    async def score(self, sample: Any) -> None:
        if sample.reward is None:
            value = float(next(self._turn) % 2)
            sample.reward = {self._reward_key: value} if self._reward_key else value

    async def score_group(self, samples: Sequence[Any]) -> None:
        for sample in samples:
            await self.score(sample)
