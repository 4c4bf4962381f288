"""The stand-in engine behind the generation server: for functions that post to the router, and for
middleware that stands before it."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dovetail.hooks import BoundHook, bind
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.tokenizers import tokenizer_of
from dovetail.run.rehearse.verdict import Fault
from dovetail.run.rehearse.world import WrittenEngine
from dovetail.run.serving import MIDDLEWARE, middleware_maker, with_sessions
from dovetail.types import DovetailError

_SIGNS = ("router_ip", "router_port", "get_model_url", "sglang_rollout", "vllm_rollout", "http_u")
_CONTEXT = 8192
_WAIT_S = 60.0
"""Longer than any limit of a rehearsal: a request never ends it."""


@contextmanager
def served(stage: Stage, engine: WrittenEngine, tokenizer: Any) -> Iterator[None]:
    """Serve `engine` where `args` says that the router is, if the user's code can ask there."""
    if not _may_ask(stage):
        yield
        return
    with server(stage, engine, tokenizer, middleware_of(stage)):
        yield


def middleware(hook: BoundHook, stage: Stage) -> None:
    """A request of SGLang's form goes through it and back."""
    tokenizer = tokenizer_of(stage.config)
    engine = WrittenEngine(tokenizer, ["The answer is 4."])
    with server(stage, engine, tokenizer, [hook]) as url:
        request = {"text": "What is 2 + 2?", "sampling_params": {"max_new_tokens": 64}}
        status, answer = stage.call(asyncio.to_thread, _post, f"{url}/generate", request)
    if status != 200:
        raise Fault(f"a request to /generate through it ends with status {status}: {answer:.200}")
    try:
        known = json.loads(answer)
    except ValueError:
        raise Fault(f"a request through it is answered with no JSON: {answer:.200}") from None
    if not isinstance(known, dict) or "text" not in known:
        raise Fault(f"a request through it is answered without 'text': {answer:.200}")


def _post(url: str, request: dict[str, Any]) -> tuple[int, str]:
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(url, body, headers)
    # Not by a proxy of the environment: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=_WAIT_S) as answer:
            return int(answer.status), answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@contextmanager
def server(
    stage: Stage,
    engine: WrittenEngine,
    tokenizer: Any,
    hooks: list[BoundHook],
    context_len: int = _CONTEXT,
) -> Iterator[str]:
    """Serve `engine`, and sessions before it, where `args` says then; its address."""
    # They take a while to import: only rehearsals that serve wait for them.
    from dovetail.router.bridge import Bridge

    bridge = Bridge(
        lambda: engine,
        lambda: tokenizer,
        model=str(stage.config.model.hf_checkpoint or "rehearsal"),
        limits=lambda: (context_len, None),
    )
    makers = [middleware_maker(hook) for hook in hooks]
    serving = with_sessions(bridge, stage.args, middleware=makers)
    serving.start(stage.loop)
    try:
        yield serving.url
    finally:
        serving.close()


def middleware_of(stage: Stage) -> list[BoundHook]:
    """That of the run: functions may rely on what it adds. One that can't be loaded is told of by
    its own verdict."""
    found = []
    for path in stage.config.hooks.router_middleware_paths:
        try:
            found.append(bind(MIDDLEWARE, path, stage.args))
        except DovetailError:
            return []
    return found


def _may_ask(stage: Stage) -> bool:
    """Whether a module of the user's mentions the router, or imported what asks there for it."""
    if "dovetail.compat.modules.http" in sys.modules:
        return True
    modules = [
        module
        for module in list(sys.modules.values())
        # torch.classes says "_classes.py", which would be a file of the working directory.
        if os.path.isabs(file := getattr(module, "__file__", None) or "") and stage.is_users(file)
    ]
    return any(sign in _source(module) for module in modules for sign in _SIGNS)


def _source(module: object) -> str:
    try:
        return inspect.getsource(module)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
