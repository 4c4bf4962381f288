"""SGLang's routes by which a fleet steers one of its engines: new weights, pause, memory. Only
`dovetail serve` before an engine of its own process has them; elsewhere the run does all that.

Bodies and answers are those of SGLang 0.5 (sglang/srt/managers/io_struct.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.describe import alone, described
from dovetail.router.fields import Fields, RequestError, Shape
from dovetail.router.respond import Json, failure_body, read
from dovetail.types import DovetailError
from dovetail.types.errors import BrokenUpdateError
from dovetail.types.weights import Meeting

PAUSES = ("abort", "retract", "in_place")
CHECKS = ("checksum", "snapshot", "reset_tensors", "compare")
MEMORY = ("weights", "kv_cache", "cuda_graph")
_GET_OR_POST = ["GET", "POST"]
_DIRECTORY = Shape({"type": "string", "pattern": "^/"}, sample="/model", required=True)
_VERSION_SCHEMA: Mapping[str, Any] = {
    "anyOf": [{"type": "string", "pattern": "^[0-9]{1,18}$"}, {"type": "integer", "minimum": 0}]
}
_VERSION = Shape({"anyOf": [*_VERSION_SCHEMA["anyOf"], {"type": "null"}]})
_NEW_VERSION = Shape(_VERSION_SCHEMA, sample="1", required=True)
_MOST_DIGITS = 18
"""Versions are counted in machine words."""


class Steered(Protocol):
    """The engine, as its steering sees it. Lives on the loop that serves."""

    @property
    def weight_version(self) -> int: ...

    async def abort(self) -> None:
        """End requests under way with what they have."""
        ...

    async def pause(self) -> None:
        """Make no token until `resume`."""
        ...

    async def resume(self) -> None: ...

    async def load_weights(self, directory: Path, version: int | None) -> int:
        """Take weights, all or none; how many requests waited meanwhile. Without a version, one
        more than the last.

        Raises:
            DovetailError: they are damaged, or another model's. The old ones are as they were.
        """
        ...

    async def meet(self, meeting: Meeting, version: int) -> None:
        """Take weights hand to hand from the trainer.

        Raises:
            BrokenUpdateError: it broke off; nothing is answered until weights came whole.
            DovetailError: they are another model's. The old ones are as they were.
        """
        ...

    async def set_weight_version(self, version: int) -> None: ...

    async def release_memory(self, tags: tuple[str, ...]) -> None: ...

    async def resume_memory(self, tags: tuple[str, ...]) -> None: ...

    async def check_weights(self, action: str, skip: tuple[str, ...]) -> dict[str, str]:
        """Do one of CHECKS; of `checksum` the sums by name.

        Raises:
            DovetailError: the weights are not those of the snapshot.
        """
        ...

    async def probe(self) -> None:
        """Run a forward, unless the engine is busy or paused.

        Raises:
            DovetailError: it failed.
        """
        ...


@dataclass(frozen=True)
class _Update:
    """A request for new weights."""

    directory: Path
    version: int | None
    abort: bool
    keep_pause: bool


def routes(steered: Steered) -> list[BaseRoute]:
    """The routes. They go before those of the same paths that refuse."""
    return [*_weights(steered), *_pauses(steered), *_memory(steered), *_looks(steered)]


def _weights(steered: Steered) -> list[BaseRoute]:
    @described("Take the weights of a directory, all or none", alone(_read_update))
    async def from_disk(request: Request) -> Response:
        asked = await read(request, _read_update)
        try:
            if asked.abort:
                await steered.abort()
            waiting = await steered.load_weights(asked.directory, asked.version)
        except DovetailError as error:
            return _failed(error, num_paused_requests=0)
        if asked.keep_pause:
            await steered.pause()
        now = steered.weight_version
        message = f"Succeeded to update model weights. Weight version updated to {now}."
        return Json({"success": True, "message": message, "num_paused_requests": waiting})

    @described("Say of which version the weights are", alone(_read_version))
    async def new_version(request: Request) -> Response:
        version, abort = await read(request, _read_version)
        if abort:
            await steered.abort()
        await steered.set_weight_version(version)
        message = f"Weight version updated to {version}"
        return Json({"success": True, "message": message, "new_version": str(version)})

    @described("Take weights hand to hand from the trainer that says where", alone(_read_meeting))
    async def meet(request: Request) -> Response:
        meeting, version = await read(request, _read_meeting)
        try:
            await steered.meet(meeting, version)
        except DovetailError as error:
            status = 409 if isinstance(error, BrokenUpdateError) else 400
            return _failed(error, status)
        return Json({"success": True, "message": f"Weight version updated to {version}"})

    return [
        Route("/update_weights_from_disk", from_disk, methods=["POST"]),
        Route("/meet_for_weights", meet, methods=["POST"]),
        Route("/update_weight_version", new_version, methods=["POST"]),
    ]


def _pauses(steered: Steered) -> list[BaseRoute]:
    @described("Make no token until /continue_generation", alone(_read_pause))
    async def pause(request: Request) -> Response:
        mode = await read(request, _read_pause)
        await steered.pause()
        if mode == "abort":
            await steered.abort()
        return Json({"message": "Generation paused successfully.", "status": "ok"})

    @described("Go on after /pause_generation", alone(_read_nothing))
    async def go_on(request: Request) -> Response:
        await read(request, _read_nothing)
        await steered.resume()
        return Json({"message": "Generation continued successfully.", "status": "ok"})

    return [
        Route("/pause_generation", pause, methods=["POST"]),
        Route("/continue_generation", go_on, methods=["POST"]),
    ]


def _memory(steered: Steered) -> list[BaseRoute]:
    @described("Give memory back", alone(_read_tags))
    async def release(request: Request) -> Response:
        await steered.release_memory(await read(request, _read_tags))
        return Json(None)

    @described("Take memory again", alone(_read_tags))
    async def resume(request: Request) -> Response:
        await steered.resume_memory(await read(request, _read_tags))
        return Json(None)

    return [
        Route("/release_memory_occupation", release, methods=_GET_OR_POST),
        Route("/resume_memory_occupation", resume, methods=_GET_OR_POST),
    ]


def _looks(steered: Steered) -> list[BaseRoute]:
    @described("Sums of the weights; a copy, noise, a comparison", alone(_read_check))
    async def check(request: Request) -> Response:
        action, skip = await read(request, _read_check)
        try:
            sums = await steered.check_weights(action, skip)
        except DovetailError as error:
            return _failed(error)
        said: dict[str, Any] = {"success": True, "message": f"{action} done"}
        return Json({**said, "ranks": [{"checksums": sums}]} if sums else said)

    @described("Whether the engine can run a forward")
    async def health(request: Request) -> Response:
        try:
            await steered.probe()
        except DovetailError as error:
            raise RequestError(f"the engine does not work: {error}", status=503) from error
        return Response(status_code=200)

    return [
        Route("/weights_checker", check, methods=_GET_OR_POST),
        Route("/health_generate", health, methods=_GET_OR_POST),
    ]


def _failed(error: DovetailError, status: int = 400, **more: int) -> Response:
    """As SGLang says it, and as everything else here."""
    told = failure_body(RequestError(str(error), status=status))
    return Json({"success": False, **more, **told}, status_code=status)


def _read_meeting(fields: Fields) -> tuple[Meeting, int]:
    text = {name: fields.text(name) for name in ("transport", "host", "name", "backend")}
    port = fields.integer("port", 0, 1, 65535)
    engines = fields.integer("num_engines", 1, 1)
    meeting = Meeting(
        **{name: value or "" for name, value in text.items()},
        port=port or 0,
        num_engines=engines or 1,
        patience_s=fields.number("patience_s", 120.0, 0.0, 86400.0),
    )
    version = _version(fields, "weight_version", _NEW_VERSION)
    _finish(fields)
    if meeting.transport not in ("broadcast", "cuda_ipc"):
        raise fields.wrong("transport", text["transport"], "broadcast or cuda_ipc")
    if meeting.backend not in ("gloo", "nccl"):
        raise fields.wrong("backend", text["backend"], "gloo or nccl")
    if version is None or not meeting.host or not meeting.name:
        raise fields.wrong("name", text["name"], "a meeting with host, name and weight_version")
    return meeting, version


def _read_update(fields: Fields) -> _Update:
    found = _Update(
        _directory(fields),
        _version(fields, "weight_version", _VERSION),
        abort=fields.flag("abort_all_requests", False),
        keep_pause=fields.flag("keep_pause", False),
    )
    fields.choice("load_format", ("auto", "safetensors"))
    fields.refuse("weights are read whole", manifest=None)
    # Keys and values of old weights never outlive them here.
    fields.ignore("flush_cache", "torch_empty_cache", "recapture_cuda_graph", "is_async")
    fields.ignore("token_step")
    _finish(fields)
    return found


def _read_version(fields: Fields) -> tuple[int, bool]:
    version = _version(fields, "new_version", _NEW_VERSION)
    if version is None:
        raise fields.wrong("new_version", None, "a whole number, as text")
    abort = fields.flag("abort_all_requests", True)
    _finish(fields)
    return version, abort


def _read_pause(fields: Fields) -> str:
    mode = fields.choice("mode", PAUSES) or "abort"
    _finish(fields)
    return mode


def _read_nothing(fields: Fields) -> None:
    fields.ignore("torch_empty_cache")
    _finish(fields)


def _read_check(fields: Fields) -> tuple[str, tuple[str, ...]]:
    action = fields.choice("action", CHECKS) or "checksum"
    skip = fields.texts("skip_tensor_list")
    # Nothing is quantised, and there is one model.
    fields.ignore("allow_quant_error", "selector")
    _finish(fields)
    return action, skip


def _read_tags(fields: Fields) -> tuple[str, ...]:
    tags = fields.texts("tags") or MEMORY
    _finish(fields)
    wrong = [tag for tag in tags if tag not in MEMORY]
    if wrong:
        raise fields.wrong("tags", list(tags), f"some of {', '.join(MEMORY)}")
    return tags


def _directory(fields: Fields) -> Path:
    given = fields.raw("model_path", shape=_DIRECTORY)
    if not isinstance(given, str) or not given.startswith("/") or "\0" in given:
        raise fields.wrong("model_path", given, "an absolute path of a directory with safetensors")
    return Path(given)


def _finish(fields: Fields) -> None:
    """What every request of SGLang may have."""
    fields.ignore("rid", "http_worker_ipc")
    fields.finish()


def _version(fields: Fields, name: str, shape: Shape) -> int | None:
    """SGLang's versions are texts; here they are counted."""
    given = fields.raw(name, shape=shape)
    if given is None:
        return None
    text = str(given) if isinstance(given, str | int) and not isinstance(given, bool) else ""
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS:
        raise fields.wrong(name, given, "a whole number, as text")
    return int(text)
