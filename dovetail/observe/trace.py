"""Tracing for whoever writes a hook: what happened to a sample, and when.

    with trace_span(sample, "search") --> two events in sample.trace --> sample files
                                                        |
                                                        +--> trace/step_*.json (--trace)

`sample.trace` is a plain dict: `{"version", "trace_id", "attempt", "events": [...]}`. It travels
with the sample through `to_dict`, copies and the buffer. An event has `type` (span_start, span_end
or event), `name`, `ts` (seconds since 1970), `span_id` and `parent_span_id`, `attempt`, `attrs`.

Nothing here raises an error of its own: a trace that can't be written costs no sample. What the
traced code raises passes through.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dovetail.types.sample import Sample

log = logging.getLogger(__name__)

VERSION = 1
TRACE_CHILDREN_KEY = "trace_children"
"""Attribute that holds spans measured elsewhere: `[{"name", "duration", "attrs", "children"}]`."""
_MOST_EVENTS = 10_000
"""Per sample; later ones are counted in `dropped` instead."""
_LONGEST_TEXT = 2_000
_DEEPEST = 6
# The wall clock may be set back while a span is open; this one only goes forward.
_WALL_S = time.time() - time.perf_counter()
_span_numbers = itertools.count(1)
_open: ContextVar[tuple[_Open, ...]] = ContextVar("dovetail_trace_open", default=())
_recording: ContextVar[bool] = ContextVar("dovetail_trace_recording", default=False)
_NOT_RECORDED = nullcontext()

Target = Any
"""A Sample, a TraceHandle, or a (nested) list of them: a group."""


def wall_time(perf_counter_s: float | None = None) -> float:
    """Seconds since 1970, now or at a value of `time.perf_counter`."""
    return _WALL_S + (time.perf_counter() if perf_counter_s is None else perf_counter_s)


@dataclass(frozen=True)
class TraceHandle:
    """The trace of one sample, without the sample. `carrier` is the sample's own dict."""

    carrier: dict[str, Any]
    parent_span_id: str | None = None

    @property
    def trace_id(self) -> str:
        """The same for the sample and its copies."""
        return str(self.carrier["trace_id"])


@dataclass(frozen=True)
class _Open:
    """A span that is under way in this task, for the spans inside of it."""

    span_id: str
    handles: tuple[TraceHandle, ...]


@dataclass
class Span:
    """What `trace_span` gives: attributes that are known only at its end."""

    name: str
    span_id: str
    attrs: dict[str, Any] = field(default_factory=dict)

    def set(self, key: str, value: Any) -> None:
        """One attribute."""
        self.attrs[str(key)] = value

    def update(self, attrs: Mapping[str, Any] | None) -> None:
        """Several attributes."""
        try:
            self.attrs.update(attrs or {})
        except (TypeError, ValueError) as error:
            _lost("update", self.name, error)


@contextmanager
def trace_span(
    target: Target,
    name: str,
    *,
    attrs: Mapping[str, Any] | None = None,
    record_error: bool = True,
) -> Iterator[Span]:
    """Record how long the block took, on each sample of `target`.

    With `record_error` an exception that leaves the block is noted in the span's `error`.

    Example:
        >>> with trace_span(sample, "search", attrs={"query": query}) as span:
        ...     documents = await search(query)
        ...     span.set("found", len(documents))
    """
    span = Span(name, _new_span_id())
    handles = _begin(target, span, attrs)
    token = _open.set((*_open.get(), _Open(span.span_id, handles)))
    try:
        yield span
    except BaseException as error:
        if record_error:
            span.attrs.setdefault("error", f"{type(error).__name__}: {error}")
        raise
    finally:
        _end(handles, span)
        try:
            _open.reset(token)
        # A generator that is closed by another task ends in that task's context.
        except ValueError as error:
            _lost("span", name, error)


@contextmanager
def recording_run(on: bool) -> Iterator[None]:
    """Whether `run_span` records, for the block and the tasks that it starts."""
    token = _recording.set(on)
    try:
        yield
    finally:
        _recording.reset(token)


def run_span(target: Target, name: str) -> AbstractContextManager[Span | None]:
    """A span of our own stages: recorded under `recording_run` only, because times make the files
    of two equal runs differ.
    """
    return trace_span(target, name) if _recording.get() else _NOT_RECORDED


def trace_event(target: Target, name: str, *, attrs: Mapping[str, Any] | None = None) -> None:
    """Record a moment on each sample of `target`."""
    for handle in _handles(target, name):
        _record(handle, "event", name, None, attrs)


def trace_function(
    name: str,
    *,
    target: Target | str | None = None,
    target_getter: Callable[..., Target] | None = None,
    attrs_getter: Callable[..., Mapping[str, Any]] | None = None,
    record_error: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: every call of the function, plain or async, is a span.

    Args:
        target: the name of the parameter that holds the sample or group, or the target itself.
            Without it and without `target_getter`: the first sample or group among the arguments,
            else what the enclosing span is recorded on.
        target_getter: called with the function's arguments.
        attrs_getter: called with the function's arguments; its result is the span's `attrs`.

    Example:
        >>> @trace_function("judge", target="sample")
        ... async def reward(args, sample, **kwargs): ...
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        find = target_getter or _finder(function, target)

        def span(args: Any, kwargs: Any) -> Any:
            found = _quiet(find, name, args, kwargs)
            attrs = None if attrs_getter is None else _quiet(attrs_getter, name, args, kwargs)
            return trace_span(found, name, attrs=attrs, record_error=record_error)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def traced_async(*args: Any, **kwargs: Any) -> Any:
                with span(args, kwargs):
                    return await function(*args, **kwargs)

            return traced_async

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with span(args, kwargs):
                return function(*args, **kwargs)

        return traced

    return decorate


def trace_next_attempt(target: Target, *, attrs: Mapping[str, Any] | None = None) -> None:
    """Say that the sample starts over: what follows belongs to its next attempt."""
    for handle in _handles(target, "next_attempt"):
        handle.carrier["attempt"] = int(handle.carrier.get("attempt", 0)) + 1
        _record(handle, "event", "next_attempt", None, attrs)


def bind_trace(sample: Sample | TraceHandle) -> TraceHandle | None:
    """The handle of a sample's trace, which is begun if it has none; None for anything else."""
    if isinstance(sample, TraceHandle):
        return sample
    try:
        carrier = getattr(sample, "trace", None)
        if not _is_carrier(carrier):
            carrier = {
                "version": VERSION,
                "trace_id": uuid.uuid4().hex,
                "attempt": 0,
                "events": [],
            }
            sample.trace = carrier  # type: ignore[attr-defined]
    # Something without attributes of its own, e.g. None.
    except (AttributeError, TypeError) as error:
        _lost("bind", type(sample).__name__, error)
        return None
    return TraceHandle(carrier)  # type: ignore[arg-type]


def export_trace(target: Sample | TraceHandle) -> dict[str, Any] | None:
    """A copy of the trace as JSON-able data, for another process; None if there is nothing."""
    handle = bind_trace(target)
    if handle is None:
        return None
    inside = _parent(handle)
    return {**copy.deepcopy(handle.carrier), "parent_span_id": inside}


def import_trace(data: Mapping[str, Any] | None) -> TraceHandle | None:
    """The other end of `export_trace`: a handle to record on; None if `data` is no trace."""
    if not _is_carrier(data):
        _lost("import", "trace", TypeError(f"got {type(data).__name__}"))
        return None
    carrier = copy.deepcopy(dict(data))  # type: ignore[arg-type]
    return TraceHandle(carrier, carrier.pop("parent_span_id", None))


def _is_carrier(value: Any) -> bool:
    return isinstance(value, Mapping) and "trace_id" in value and "events" in value


def _new_span_id() -> str:
    return f"{os.getpid():x}-{next(_span_numbers):x}"


def _handles(target: Target, name: str) -> tuple[TraceHandle, ...]:
    if target is None:
        return ()
    samples = list(_flat(target))
    bound = (bind_trace(one) for one in samples if isinstance(one, Sample | TraceHandle))
    handles = tuple(handle for handle in bound if handle is not None)
    if len(handles) < len(samples):
        odd = next(one for one in samples if not isinstance(one, Sample | TraceHandle))
        _lost("span", name, TypeError(f"nothing to trace on: {type(odd).__name__}"))
    return handles


def _flat(target: Target) -> Iterable[Any]:
    if isinstance(target, list | tuple):
        for one in target:
            yield from _flat(one)
    else:
        yield target


def _begin(target: Target, span: Span, attrs: Mapping[str, Any] | None) -> tuple[TraceHandle, ...]:
    handles = _handles(target, span.name)
    for handle in handles:
        _record(handle, "span_start", span.name, span.span_id, attrs)
    return handles


def _end(handles: tuple[TraceHandle, ...], span: Span) -> None:
    for handle in handles:
        _record(handle, "span_end", span.name, span.span_id, span.attrs)


def _record(
    handle: TraceHandle,
    kind: str,
    name: str,
    span_id: str | None,
    attrs: Mapping[str, Any] | None,
) -> None:
    try:
        events = handle.carrier["events"]
        if len(events) >= _MOST_EVENTS and kind != "span_end":
            handle.carrier["dropped"] = handle.carrier.get("dropped", 0) + 1
            return
        event: dict[str, Any] = {"type": kind, "name": str(name), "ts": wall_time()}
        if span_id is not None:
            event["span_id"] = span_id
        if kind != "span_end" and (parent := _parent(handle)) is not None:
            event["parent_span_id"] = parent
        event["attempt"] = handle.carrier.get("attempt", 0)
        if attrs:
            event["attrs"] = {str(key): plain(value) for key, value in dict(attrs).items()}
        events.append(event)
    # Attributes are the user's objects, and anything may be wrong with them.
    except Exception as error:
        _lost("record", name, error)


def _parent(handle: TraceHandle) -> str | None:
    for span in reversed(_open.get()):
        if any(other.carrier is handle.carrier for other in span.handles):
            return span.span_id
    return handle.parent_span_id


def plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON can hold it: long text is cut, what has no form in JSON becomes text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEEPEST and isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth + 1) for item in value]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item(), depth + 1)
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "..."


def _finder(function: Callable[..., Any], target: Target | str | None) -> Callable[..., Target]:
    """From a call's arguments to what it is recorded on."""
    if target is not None and not isinstance(target, str):
        return lambda *args, **kwargs: target
    signature = inspect.signature(function)

    def find(*args: Any, **kwargs: Any) -> Target:
        given = signature.bind(*args, **kwargs).arguments
        if target is not None:
            return given[target]
        for value in given.values():
            first = next(iter(_flat(value)), None)
            # Calls of our own and of miles carry the sample.
            sample = getattr(value, "sample", None)
            if isinstance(first, Sample | TraceHandle) or isinstance(sample, Sample):
                return sample if isinstance(sample, Sample) else value
        return list(_open.get()[-1].handles) if _open.get() else None

    return find


def _quiet(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    # The user's getter; the call that it describes goes on without it.
    except Exception as error:
        _lost("function", name, error)
        return None


def _lost(what: str, name: str, error: Exception) -> None:
    log.debug("trace %s %r is not recorded: %s", what, name, error)
