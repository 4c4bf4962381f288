"""vLLM's routes as its client sees them, with answers that a test writes: what no healthy server
says. Real answers are in tests/integration/test_vllm_engine.py."""

import asyncio
from contextlib import asynccontextmanager

from aiohttp import web

from dovetail.engines.launch import ClientSettings
from dovetail.engines.vllm.client import make_client
from dovetail.types.calls import GenerateRequest, SamplingParams

GENERATE = "/inference/v1/generate"


def answer(ids, *, version="default", reason="stop", **changes):
    """What vLLM 0.32 answers to `/inference/v1/generate`."""
    choice = {
        "index": 0,
        "finish_reason": reason,
        "stop_reason": None,
        "token_ids": list(ids),
        "routed_experts": None,
        "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
        "logprobs": {"content": [{"token_id": t, "logprob": -0.5, "rank": 1} for t in ids]},
    }
    return {
        "request_id": "x",
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": len(ids),
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "prompt_logprobs": None,
        "choices": [{**choice, **changes}],
    }


class ProtocolServer:
    """Keeps what was asked. `answers[path]` is a body, a `web.Response`, or an async function of
    the request's JSON that gives one of these; without one, control routes answer {}."""

    def __init__(self):
        self.answers = {}
        self.asked = []
        self.url = ""

    def paths(self):
        return [path for path, _ in self.asked]

    async def _handle(self, request):
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path_qs, body))
        found = self.answers.get(request.path, {})
        if callable(found):
            found = await found(body)
        return found if isinstance(found, web.StreamResponse) else web.json_response(found)


@asynccontextmanager
async def protocol_server():
    server = ProtocolServer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server._handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = "http://{}:{}".format(*runner.addresses[0])
    try:
        yield server
    finally:
        await runner.cleanup()


def error(message, status=500):
    """As vLLM words what went wrong."""
    body = {"error": {"message": message, "type": "InternalServerError", "code": status}}
    return web.json_response(body, status=status)


async def never(body):
    """No answer at all."""
    await asyncio.Event().wait()


def run(work, **settings):
    """`await work(client, server)` with a client and the server that it asks."""

    async def everything():
        async with protocol_server() as server:
            known = {"max_context_len": 64, "vocab_size": 101, "request_timeout_s": 20.0}
            client = make_client(server.url, ClientSettings(**{**known, **settings}))
            try:
                return await asyncio.wait_for(work(client, server), 30)
            finally:
                await client.close()

    return asyncio.run(everything())


def ask(name="r", prompt=(5, 6, 7), num_generated=0, **sampling):
    experts = sampling.pop("return_routed_experts", False)
    params = SamplingParams(**{"max_new_tokens": 4, **sampling})
    return GenerateRequest(name, tuple(prompt), params, num_generated, experts)


def generate(reply, request=None, **settings):
    async def work(client, server):
        server.answers[GENERATE] = reply
        return await client.generate(request or ask())

    return run(work, **settings)
