"""A router that answers /generate as it is told, and a tokenizer of letters."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from dovetail.compat.agent.aiohttp_threaded import AppHandle, run_app_in_thread

EOS = "$"


class Letters:
    """One token per character, `$` ends a turn; `u:` `a:` `t:` `s:` begin one."""

    eos_token = EOS

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, messages: list[dict], **kwargs: Any) -> list[int]:
        text = "".join(f"{m['role'][0]}:{_written(m)}{EOS}" for m in messages)
        tools = f"[{','.join(tool['function']['name'] for tool in kwargs.get('tools') or [])}]"
        return [ord(c) for c in tools + text + "a:" * kwargs["add_generation_prompt"]]


def _written(message: dict) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    marks = "".join(
        f'<tool_call>{{"name": "{c["name"]}", "arguments": {_json(c["arguments"])}}}</tool_call>'
        for c in calls
    )
    return f"{message['content']}{marks}"


def _json(arguments: dict) -> str:
    return "{" + ", ".join(f'"{k}": "{v}"' for k, v in arguments.items()) + "}"


class Engine:
    """Gives one script after another; the last one for ever."""

    def __init__(self, *scripts: str, finish: str = "stop") -> None:
        self.scripts, self.finish = list(scripts), finish
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.aborted: list[Any] = []
        self.hangs = False
        self.status = 200
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        self.handle: AppHandle = run_app_in_thread(app)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.handle.port}"

    async def _generate(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("X-SMG-Routing-Key"))
        while self.hangs:
            await asyncio.sleep(0.01)
        if self.status != 200:
            return web.Response(status=self.status, text="no engine")
        text = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        pairs = [[-(i + 1) / 8, ord(c), None] for i, c in enumerate(text)]
        reason = {"type": self.finish}
        meta = {"output_token_logprobs": pairs, "finish_reason": reason, "weight_version": "3"}
        return web.json_response({"text": text, "meta_info": meta})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.json_response({})
