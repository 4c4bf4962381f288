"""The router in a process of its own, before an engine that says the same to everybody, with short
limits: what the soak of the router runs against in a test.

    python -m tests.loop.soaked_server MODEL_DIR CONNECTIONS
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

import uvloop

from benchmarks.soak_model import CONTEXT
from benchmarks.soak_probe import TOKEN
from dovetail.router.bridge import Bridge
from dovetail.router.limits import Limits
from dovetail.router.security import Access
from dovetail.router.server import RouterServer
from dovetail.router.sessions.server import SessionServer
from dovetail.types import FinishReason, GenerateRequest, GenerateResult
from dovetail.types.calls import VersionSpan

VOCAB = 262


class Same:
    """Says the token 70, as often as it is asked to."""

    weight_version = 1

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        await asyncio.sleep(0.001)
        room = CONTEXT - len(request.prompt_ids)
        many = max(0, min(room, request.sampling.max_new_tokens))
        return GenerateResult(
            request.request_id,
            [70] * many,
            [-1.0] * many,
            FinishReason.LENGTH,
            version_spans=(VersionSpan(1, 0, many),) if many else (),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=0,
        )

    async def abort(self, request_ids: Sequence[str] | None = None) -> None: ...

    async def close(self) -> None: ...


async def _serve(model: str, connections: int) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    engine = Same()
    bridge = Bridge(
        lambda: engine, lambda: tokenizer, model="same", limits=lambda: (CONTEXT, VOCAB)
    )
    server = RouterServer(
        bridge,
        access=Access("127.0.0.1", os.environ[TOKEN]),
        limits=Limits(connections=connections, head_s=2.0, body_s=1.0),
        routes=SessionServer(bridge).routes(),
    )
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await server.serve_here()
    print(f"serving at {server.url}", flush=True)
    await over.wait()
    await server.aclose()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2])))
