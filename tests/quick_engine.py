"""An engine that starts in a tenth of a second: SGLang's forms, tokens out of the seed alone.

    python -I -S tests/quick_engine.py PORT WITNESS TOKEN_S LOAD_S

It needs nothing but the standard library. Each thing that it does is a line of JSON in the file
WITNESS: start, begin, answer, loading, loaded, pause, resume; with its process id, and the version
of its weights. A token takes TOKEN_S seconds, taking weights LOAD_S.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

FIRST_TOKEN, NUM_TOKENS = 3, 10
"""Digits, in the vocabulary of tests/loop/tiny.py."""
DEADLY = 13
"""A request for so many tokens ends the process."""


class QuickEngine:
    """One model of no model."""

    def __init__(self, witness: str, token_s: float, load_s: float) -> None:
        self._witness, self._token_s, self._load_s = witness, token_s, load_s
        self.version = "default"
        self._going = asyncio.Event()
        self._going.set()
        self._aborted: set[str] = set()

    def tell(self, event: str, **more: Any) -> None:
        line = {"event": event, "pid": os.getpid(), "version": self.version, **more}
        handle = os.open(self._witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, json.dumps(line).encode() + b"\n")
        os.close(handle)

    async def answer(self, path: str, body: dict[str, Any]) -> Any:
        path = path.partition("?")[0]
        if path == "/generate":
            return await self._generate(body)
        if path == "/update_weights_from_disk":
            return await self._load(body)
        if path == "/pause_generation":
            self._going.clear()
            self.tell("pause")
        elif path == "/continue_generation":
            self._going.set()
            self.tell("resume")
        elif path == "/abort_request":
            self._aborted.add(body["rid"])
        elif path == "/model_info":
            return {"weight_version": self.version}
        return {}

    async def _generate(self, body: dict[str, Any]) -> Any:
        rid, sampling = body["rid"], body["sampling_params"]
        self.tell("begin", rid=rid)
        if sampling["max_new_tokens"] == DEADLY:
            print("out of memory", flush=True)
            os._exit(4)
        ids: list[int] = []
        for position in range(sampling["max_new_tokens"]):
            await asyncio.sleep(self._token_s)
            await self._going.wait()
            if rid in self._aborted:
                break
            ids.append(_drawn(sampling["sampling_seed"], position))
        ended = "abort" if rid in self._aborted else "length"
        self._aborted.discard(rid)
        self.tell("answer", rid=rid)
        return {
            "text": "",
            "output_ids": ids,
            "meta_info": {
                "id": rid,
                "finish_reason": {"type": ended},
                "output_token_logprobs": [[-2.5, token, None] for token in ids],
                "completion_tokens": len(ids),
                "cached_tokens": 0,
                "weight_version": self.version,
            },
        }

    async def _load(self, body: dict[str, Any]) -> Any:
        self.tell("loading", path=body["model_path"])
        found = json.loads((Path(body["model_path"]) / "dovetail_weights.json").read_bytes())
        await asyncio.sleep(self._load_s)
        for name, facts in found["files"].items():
            assert (Path(body["model_path"]) / name).stat().st_size == facts["size_bytes"]
        assert str(found["version"]) == body["weight_version"]
        self.version = body["weight_version"]
        self.tell("loaded")
        return {"success": True, "message": ""}


def _drawn(seed: int, position: int) -> int:
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    return FIRST_TOKEN + digest[0] % NUM_TOKENS


async def serve(engine: QuickEngine, port: int) -> None:
    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                said = await engine.answer(lines[0].split(" ")[1], json.loads(raw or b"{}"))
                text = json.dumps(said).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(text), text)
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(connection, "127.0.0.1", port) as server:
        engine.tell("start")
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(
        serve(QuickEngine(sys.argv[2], float(sys.argv[3]), float(sys.argv[4])), int(sys.argv[1]))
    )
