"""GET /openapi.json: every route, with the bodies that it reads.

A body's schema is what its reader does: the reader runs on a `Recorder`, which notes every field
that is asked for, its kind and its bounds, and answers with what does no harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dovetail import __version__
from dovetail.router.bridge import Bridge
from dovetail.router.describe import NOT_HERE, description_of
from dovetail.router.fields import Fields, RequestError, Shape
from dovetail.router.respond import Json
from dovetail.router.security import OPEN_PATHS
from dovetail.types import ScoreRequest, ScoreResult

_ERROR = {"$ref": "#/components/schemas/Error"}
_TEXT_OR_NOTHING = {"type": ["string", "null"]}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["object", "message", "error"],
    "properties": {
        "object": {"const": "error"},
        "message": {"type": "string"},
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param", "expected"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "integer", "description": "The HTTP status."},
                "param": {**_TEXT_OR_NOTHING, "description": "The field that is wrong."},
                "got": {"description": "What it has."},
                "expected": {**_TEXT_OR_NOTHING, "description": "What it should have."},
            },
        },
    },
}


class Recorder(Fields):
    """Notes what is read, instead of reading."""

    def __init__(self, path: str = "") -> None:
        super().__init__({}, path)
        self._properties: dict[str, Any] = {}
        self._required: list[str] = []
        self._closed = False

    @property
    def schema(self) -> dict[str, Any]:
        """What was read so far."""
        found: dict[str, Any] = {"type": "object", "properties": {}}
        for name, one in self._properties.items():
            if isinstance(one, list):
                table = one[0].schema
                one = {"anyOf": [table, {"type": "array", "items": table}, {"type": "null"}]}
            elif isinstance(one, Recorder):
                one = {**one.schema, "type": ["object", "null"]}
            found["properties"][name] = one
        if self._required:
            found["required"] = self._required
        return {**found, "additionalProperties": False} if self._closed else found

    def raw(self, name: str, default: Any = None, shape: Shape | None = None) -> Any:
        self._note(name, {} if shape is None else dict(shape.schema))
        if shape is None:
            return default
        if shape.required and name not in self._required:
            self._required.append(name)
        return default if shape.sample is None else shape.sample

    def integer(
        self, name: str, default: int | None, least: int | None = None, most: int | None = None
    ) -> int | None:
        self._note(name, _bounded("integer", default, least, most))
        return default

    def number(
        self, name: str, default: float, least: float | None = None, most: float | None = None
    ) -> float:
        self._note(name, _bounded("number", default, least, most))
        return default

    def flag(self, name: str, default: bool) -> bool:
        self._note(name, {"type": ["boolean", "null"], "default": default})
        return default

    def text(self, name: str, default: str | None = None) -> str | None:
        self._note(name, dict(_TEXT_OR_NOTHING))
        return default

    def choice(self, name: str, words: Sequence[str]) -> str | None:
        self._note(name, {"enum": [*words, None]})
        return None

    def texts(self, name: str, most: int | None = None) -> tuple[str, ...]:
        one = {"type": "string", "minLength": 1}
        many = {"type": "array", "items": one, **_at_most(most)}
        self._note(name, {"anyOf": [one, many, {"type": "null"}]})
        return ()

    def ids(self, name: str, *, required: bool = False, most: int | None = None) -> tuple[int, ...]:
        schema: dict[str, Any] = {"items": {"type": "integer", "minimum": 0}, **_at_most(most)}
        if not required:
            self._note(name, {"type": ["array", "null"], **schema})
            return ()
        self._note(name, {"type": "array", "minItems": 1, **schema})
        self._required.append(name)
        return (1,)

    def table(self, name: str) -> Fields:
        made = Recorder(f"{self._path}{name}.")
        self._note(name, made)
        return made

    def tables(self, name: str, count: int) -> list[Fields]:
        made = Recorder(f"{self._path}{name}.")
        self._note(name, [made])
        return [made] * count

    def refuse(self, reason: str, **neutral: Any) -> None:
        for name, value in neutral.items():
            allowed = [value] if value is None else [value, None]
            self._note(name, {"enum": allowed, "description": f"Not to be had: {reason}."})

    def ignore(self, *names: str) -> None:
        for name in names:
            self._note(name, {"description": "Accepted, without an effect."})

    def finish(self) -> None:
        self._closed = True

    def _note(self, name: str, schema: Any) -> None:
        if not self._properties.get(name):
            self._properties[name] = schema


def _at_most(most: int | None) -> dict[str, int]:
    return {} if most is None else {"maxItems": most}


def _bounded(
    kind: str, default: float | None, least: float | None, most: float | None
) -> dict[str, Any]:
    found = {"minimum": least, "maximum": most, "default": default}
    said = {name: value for name, value in found.items() if value is not None}
    return {"type": [kind, "null"], **said}


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes; of two for the same path the first counts."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, Route):
            continue
        path = paths.setdefault(route.path_format, {})
        told = description_of(route.endpoint)
        if path and told is not None and told[0].startswith(NOT_HERE):
            # By a run's server; here something else answers it.
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            path.setdefault(method.lower(), _operation(route, method))
    return {
        "openapi": "3.1.0",
        "info": {"title": "Dovetail", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR_SCHEMA},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    told = description_of(route.endpoint)
    summary, read, query = told or (route.name.replace("_", " "), None, ())
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.param_convertors
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in query]
    error = {"description": "Why not.", "content": {"application/json": {"schema": _ERROR}}}
    found: dict[str, Any] = {
        "operationId": f"{method.lower()} {route.path_format}",
        "summary": summary,
        "parameters": parameters,
        "responses": {"200": {"description": "The answer."}, "default": error},
    }
    if method != "GET" and read is not None:
        recorder = Recorder()
        # A reader may want more than it says: what it read until then is known.
        with contextlib.suppress(RequestError):
            read(recorder, _probe())
        schema = recorder.schema
        found["requestBody"] = {
            "required": bool(schema.get("required")),
            "content": {"application/json": {"schema": schema}},
        }
    if method != "GET" or route.path not in OPEN_PATHS:
        found["security"] = [{}, {"token": []}]
    return found


def routes() -> list[BaseRoute]:
    """The route of the document, which is written when it is first asked for."""
    made: list[Mapping[str, Any]] = []

    async def openapi(request: Request) -> Response:
        if not made:
            made.append(document(request.app.routes))
        return Json(made[0])

    return [Route("/openapi.json", openapi, methods=["GET"])]


class _NoModel:
    """Takes every text and message, and says nothing: an engine and a tokenizer for readers."""

    eos_token_id = pad_token_id = 0
    generate = abort = close = None

    async def score(self, request: ScoreRequest) -> ScoreResult:
        raise AssertionError("readers ask for nothing")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return ""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> list[int]:
        return [1]


def _probe() -> Bridge:
    return Bridge(lambda: _NoModel(), _NoModel, model="model")  # type: ignore[arg-type, return-value]
