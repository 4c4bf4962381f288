"""SGLang's routes by which a fleet steers one of its engines: new weights, pause, memory. Only
`dovetail serve` before an engine of its own process has them; elsewhere the run does all that.

Bodies and answers are those of SGLang 0.5 (sglang/srt/managers/io_struct.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail.router.fields import Fields, RequestError
from dovetail.router.respond import Json, fields_of
from dovetail.types import DovetailError

PAUSES = ("abort", "retract", "in_place")
CHECKS = ("checksum", "snapshot", "reset_tensors", "compare")
MEMORY = ("weights", "kv_cache", "cuda_graph")
_GET_OR_POST = ["GET", "POST"]


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


def routes(steered: Steered) -> list[BaseRoute]:
    """The routes. They go before those of the same paths that refuse."""
    return [*_weights(steered), *_pauses(steered), *_memory(steered), *_looks(steered)]


def _weights(steered: Steered) -> list[BaseRoute]:
    async def from_disk(request: Request) -> Response:
        fields = await fields_of(request)
        path, version = _directory(fields), _version(fields, "weight_version")
        abort, keep_pause = (
            fields.flag("abort_all_requests", False),
            fields.flag("keep_pause", False),
        )
        load_format = fields.text("load_format") or "auto"
        if load_format not in ("auto", "safetensors"):
            raise fields.wrong("load_format", load_format, "auto or safetensors")
        fields.refuse("weights are read whole", manifest=None)
        # Keys and values of old weights never outlive them here.
        fields.ignore("flush_cache", "torch_empty_cache", "recapture_cuda_graph", "is_async")
        fields.ignore("token_step", "rid", "http_worker_ipc")
        fields.finish()
        try:
            if abort:
                await steered.abort()
            waiting = await steered.load_weights(path, version)
        except DovetailError as error:
            said = {"success": False, "message": str(error), "num_paused_requests": 0}
            return Json(said, status_code=400)
        if keep_pause:
            await steered.pause()
        now = steered.weight_version
        message = f"Succeeded to update model weights. Weight version updated to {now}."
        return Json({"success": True, "message": message, "num_paused_requests": waiting})

    async def new_version(request: Request) -> Response:
        fields = await fields_of(request)
        version = _version(fields, "new_version")
        abort = fields.flag("abort_all_requests", True)
        fields.ignore("rid", "http_worker_ipc")
        fields.finish()
        if version is None:
            raise fields.wrong("new_version", None, "a whole number, as text")
        if abort:
            await steered.abort()
        await steered.set_weight_version(version)
        message = f"Weight version updated to {version}"
        return Json({"success": True, "message": message, "new_version": str(version)})

    return [
        Route("/update_weights_from_disk", from_disk, methods=["POST"]),
        Route("/update_weight_version", new_version, methods=["POST"]),
    ]


def _pauses(steered: Steered) -> list[BaseRoute]:
    async def pause(request: Request) -> Response:
        fields = await fields_of(request)
        mode = fields.text("mode", "abort")
        if mode not in PAUSES:
            raise fields.wrong("mode", mode, f"one of {', '.join(PAUSES)}")
        fields.ignore("rid", "http_worker_ipc")
        fields.finish()
        await steered.pause()
        if mode == "abort":
            await steered.abort()
        return Json({"message": "Generation paused successfully.", "status": "ok"})

    async def go_on(request: Request) -> Response:
        fields = await fields_of(request)
        fields.ignore("torch_empty_cache", "rid", "http_worker_ipc")
        fields.finish()
        await steered.resume()
        return Json({"message": "Generation continued successfully.", "status": "ok"})

    return [
        Route("/pause_generation", pause, methods=["POST"]),
        Route("/continue_generation", go_on, methods=["POST"]),
    ]


def _memory(steered: Steered) -> list[BaseRoute]:
    async def release(request: Request) -> Response:
        await steered.release_memory(await _tags(request))
        return Json(None)

    async def resume(request: Request) -> Response:
        await steered.resume_memory(await _tags(request))
        return Json(None)

    return [
        Route("/release_memory_occupation", release, methods=_GET_OR_POST),
        Route("/resume_memory_occupation", resume, methods=_GET_OR_POST),
    ]


def _looks(steered: Steered) -> list[BaseRoute]:
    async def check(request: Request) -> Response:
        fields = await fields_of(request)
        action = fields.text("action") or "checksum"
        if action not in CHECKS:
            raise fields.wrong("action", action, f"one of {', '.join(CHECKS)}")
        skip = fields.texts("skip_tensor_list")
        # Nothing is quantised, and there is one model.
        fields.ignore("allow_quant_error", "selector", "rid", "http_worker_ipc")
        fields.finish()
        try:
            sums = await steered.check_weights(action, skip)
        except DovetailError as error:
            return Json({"success": False, "message": str(error)}, status_code=400)
        said: dict[str, Any] = {"success": True, "message": f"{action} done"}
        return Json({**said, "ranks": [{"checksums": sums}]} if sums else said)

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


async def _tags(request: Request) -> tuple[str, ...]:
    fields = await fields_of(request)
    tags = fields.texts("tags") or MEMORY
    fields.ignore("rid", "http_worker_ipc")
    fields.finish()
    wrong = [tag for tag in tags if tag not in MEMORY]
    if wrong:
        raise fields.wrong("tags", list(tags), f"some of {', '.join(MEMORY)}")
    return tags


def _directory(fields: Fields) -> Path:
    given = fields.text("model_path")
    if given is None or not Path(given).is_absolute():
        raise fields.wrong("model_path", given, "an absolute path of a directory with safetensors")
    return Path(given)


def _version(fields: Fields, name: str) -> int | None:
    """SGLang's versions are texts; here they are counted."""
    given = fields.raw(name)
    if given is None:
        return None
    text = str(given) if isinstance(given, str | int) and not isinstance(given, bool) else ""
    if not text.isascii() or not text.isdigit():
        raise fields.wrong(name, given, "a whole number, as text")
    return int(text)
