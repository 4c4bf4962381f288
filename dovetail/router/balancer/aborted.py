"""What a native request gets that was aborted before an engine made anything of it: 200 and no
tokens, as the engines do it, since clients repeat a request that fails."""

from __future__ import annotations

from typing import Any

import orjson

_JSON, _EVENTS = b"application/json", b"text/event-stream; charset=utf-8"


def aborted(path: str, body: bytes) -> tuple[bytes, bytes]:
    """Content type and body of the answer to the request `body` at `path`."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        request = {}
    request = request if isinstance(request, dict) else {}
    answer = _sglang(request) if path == "/generate" else _choices(path, request)
    if not request.get("stream"):
        return _JSON, orjson.dumps(answer)
    events = answer if isinstance(answer, list) else [answer]
    lines = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events]
    return _EVENTS, b"".join([*lines, b"data: [DONE]\n\n"])


def _sglang(request: dict[str, Any]) -> Any:
    prompts = request.get("input_ids", request.get("text"))
    rid = request.get("rid")
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return _sglang_one(rid, prompts)
    rids = rid if isinstance(rid, list) else [rid] * len(prompts)
    return [_sglang_one(name, prompt) for name, prompt in zip(rids, prompts, strict=False)]


def _sglang_one(rid: Any, prompt: Any) -> dict[str, Any]:
    finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    meta: dict[str, Any] = {"id": rid, "finish_reason": finish, "completion_tokens": 0}
    meta |= {"prompt_tokens": _length(prompt), "cached_tokens": 0, "output_token_logprobs": []}
    return {"text": "", "output_ids": [], "meta_info": meta}


def _choices(path: str, request: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "abort", "logprobs": None}
    if path == "/v1/chat/completions":
        said = {"role": "assistant", "content": ""}
        choice["delta" if request.get("stream") else "message"] = said
    elif path == "/v1/completions":
        choice["text"] = ""
    else:
        choice["token_ids"] = []
    prompt = _length(request.get("token_ids", request.get("prompt")))
    usage = {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}
    rid, model = request.get("request_id"), request.get("model")
    return {"id": rid, "model": model, "choices": [choice], "usage": usage}


def _length(prompt: Any) -> int:
    ids = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)
    return len(prompt) if ids else 0
