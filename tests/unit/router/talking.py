"""A tokenizer whose words can be cut in several ways, an engine that cuts them so that no tokenizer
would, and sessions over both."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dovetail.router.app import _request_error
from dovetail.router.bridge import Bridge
from dovetail.router.fields import RequestError
from dovetail.router.sessions.server import SessionServer, SessionSettings
from dovetail.types import FinishReason, GenerateRequest, GenerateResult, SamplingParams
from dovetail.types.calls import VersionSpan
from tests.unit.router.asgi import Answered, ask

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
HELLO = [{"role": "user", "content": "hello"}]
END = "<|im_end|>"
CHATML = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_THOUGHTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}",
)
ROOM = 4096


@functools.cache
def make_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """All bytes, and pairs of letters that are merged."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("h", "e"), ("he", "l"), ("o", "o"), ("Ġ", "t"), ("1", "2"), ("}", "}")]
    words = [*letters, *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(one, special=True) for one in ("<|im_start|>", END)])
    made.add_tokens([AddedToken(one, special=False) for one in ("<tool_call>", "</tool_call>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)
    fast.chat_template = template
    return fast


def cut_oddly(tokenizer: Any, text: str, draw: random.Random) -> list[int]:
    """Ids of a text as an engine may sample them: merges that a tokenizer makes are left out at
    random."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut: list[int] = []
    for one in ids:
        token = tokenizer.convert_ids_to_tokens(one)
        whole = len(token) == 1 or one in tokenizer.added_tokens_decoder or draw.random() < 0.3
        cut += [one] if whole else tokenizer.convert_tokens_to_ids(list(token))
    return cut


class Talker:
    """Says the next of `lines` to every prompt, cut oddly; a line that ends with `END` stops."""

    def __init__(self, lines: Sequence[str], seed: int = 0, template: str = CHATML) -> None:
        self.lines, self.draw = list(lines), random.Random(seed)
        self.tokenizer = make_tokenizer(template)
        self.requests: list[GenerateRequest] = []
        self.results: list[GenerateResult] = []
        self.weight_version = 3
        self.held: asyncio.Event | None = None
        self.cancelled = 0
        self.aborts = False

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        line = self.lines[len(self.requests) % len(self.lines)]
        self.requests.append(request)
        if self.held is not None:
            try:
                await self.held.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        ids = cut_oddly(self.tokenizer, line, self.draw)
        kept, finish = self._until_stop(ids, request.sampling)
        finish = FinishReason.ABORT if self.aborts else finish
        half = len(kept) // 2
        spans = (VersionSpan(3, 0, half), VersionSpan(4, half, len(kept)))
        made = GenerateResult(
            request.request_id,
            kept,
            [-self.draw.random() for _ in kept],
            finish,
            version_spans=tuple(span for span in spans if span.end > span.start),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=1,
        )
        self.results.append(made)
        return made

    def _until_stop(
        self, ids: list[int], sampling: SamplingParams
    ) -> tuple[list[int], FinishReason]:
        kept: list[int] = []
        for one in ids[: sampling.max_new_tokens]:
            kept.append(one)
            text = self.tokenizer.decode(kept)
            if one == self.tokenizer.eos_token_id or any(stop in text for stop in sampling.stop):
                return kept, FinishReason.STOP
        return kept, FinishReason.LENGTH

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self.aborts = True

    async def close(self) -> None: ...


class World:
    """Sessions over a talker, asked without a socket."""

    def __init__(self, talker: Talker, settings: SessionSettings | None = None) -> None:
        self.talker = talker
        self.bridge = Bridge(
            lambda: talker, lambda: talker.tokenizer, model="m", limits=lambda: (ROOM, None)
        )
        self.sessions = SessionServer(self.bridge, settings)
        self.app = Starlette(
            routes=self.sessions.routes(), exception_handlers={RequestError: _request_error}
        )

    async def ask(self, method: str, path: str, body: Any = None) -> Answered:
        return await ask(self.app, method, path, body)

    async def open(self, **body: Any) -> str:
        answered = await self.ask("POST", "/sessions", body)
        assert answered.status == 200, answered.body
        return str(answered.json["session_id"])

    async def chat(self, session_id: str, messages: Any, **more: Any) -> dict[str, Any]:
        """The assistant's message, from a stream where one is asked for."""
        body = {"model": "x", "messages": messages, **more}
        answered = await self.ask("POST", f"/sessions/{session_id}/v1/chat/completions", body)
        assert answered.status == 200, answered.body
        if not more.get("stream"):
            return dict(answered.json["choices"][0]["message"])
        return joined([event["choices"][0]["delta"] for event in answered.events])


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """A message out of a stream, as clients put it together."""
    message: dict[str, Any] = {}
    for delta in deltas:
        for name, value in delta.items():
            if isinstance(value, str) and name == "content":
                message[name] = (message.get(name) or "") + value
            else:
                message[name] = value
    return message


@asynccontextmanager
async def talking(
    lines: Sequence[str], *, seed: int = 0, template: str = CHATML, **settings: Any
) -> AsyncIterator[World]:
    """A world on the running loop."""
    world = World(Talker(lines, seed, template), SessionSettings(**settings))
    world.bridge.loop = asyncio.get_running_loop()
    yield world


def in_world(
    lines: list[str], work: Callable[[World, str], Awaitable[Any]], **settings: Any
) -> Any:
    async def run() -> Any:
        async with talking(lines, **settings) as world:
            return await work(world, await world.open())

    return asyncio.run(run())


async def samples_of(world: World, session_id: str, **more: Any) -> list[dict[str, Any]]:
    answered = await world.ask("POST", f"/sessions/{session_id}/samples", more)
    assert answered.status == 200, answered.body
    return list(answered.json["samples"])
