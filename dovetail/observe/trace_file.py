"""Traces as a file for ui.perfetto.dev or chrome://tracing: the Chrome trace event format.

    process "run"       one track: the phases of the step
    process "group 12"  a track per sample; spans that overlap without nesting get a lane each

A span is one complete event (`ph` X) with `ts` and `dur` in microseconds since 1970, so the files
of several steps can be opened together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from dovetail.observe.atomic import write_atomic
from dovetail.observe.trace import TRACE_CHILDREN_KEY, plain
from dovetail.types.sample import Sample

_RUN_PID = 1
_FIRST_GROUP_PID = 2
_MICRO = 1_000_000
_MOST_LANES = 64
"""Tracks of one sample."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run's own work: `start_s` since 1970."""

    name: str
    start_s: float
    seconds: float


@dataclass(slots=True)
class _Span:
    name: str
    start_us: int
    end_us: int
    args: dict[str, Any] = field(default_factory=dict)


Tracks = Iterable[tuple[str, Sequence[Sample]]]
"""Names of groups or sets, each with its samples."""


def write_trace(path: Path, tracks: Tracks, phases: Iterable[Phase] = ()) -> Path:
    """Write what is on the samples, and the run's phases, to `path`; folders are made.

    Raises:
        OSError: the file can't be written.
    """
    document = {"traceEvents": list(trace_events(tracks, phases)), "displayTimeUnit": "ms"}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS))
    return path


def trace_events(tracks: Tracks, phases: Iterable[Phase] = ()) -> Iterator[dict[str, Any]]:
    """The events of such a file. A sample without a trace has no track."""
    phases = list(phases)
    if phases:
        yield _named("process_name", _RUN_PID, 0, "run")
        spans = [_phase_span(phase) for phase in phases]
        yield from _track(spans, [], _RUN_PID, 1, "loop")
    for pid, (group, samples) in enumerate(tracks, _FIRST_GROUP_PID):
        traced = [sample for sample in samples if _events_of(sample)]
        if traced:
            yield _named("process_name", pid, 0, group)
        for place, sample in enumerate(traced):
            spans, moments = _read(_events_of(sample))
            name = f"sample {sample.index}"
            yield from _track(spans, moments, pid, 1 + place * _MOST_LANES, name)


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _phase_span(phase: Phase) -> _Span:
    start_us = round(phase.start_s * _MICRO)
    return _Span(phase.name, start_us, start_us + round(phase.seconds * _MICRO))


def _events_of(sample: Sample) -> list[Mapping[str, Any]]:
    """Its events that have the form; the trace may have come back from a plugin or a file."""
    trace = getattr(sample, "trace", None)
    events = trace.get("events") if isinstance(trace, Mapping) else None
    if not isinstance(events, list):
        return []
    return [
        event
        for event in events
        if isinstance(event, Mapping)
        and isinstance(event.get("ts"), int | float)
        and isinstance(event.get("type"), str)
    ]


def _read(events: list[Mapping[str, Any]]) -> tuple[list[_Span], list[Mapping[str, Any]]]:
    """Spans and moments. A span without an end goes on to the last event, `unfinished`."""
    last_us = round(max(event["ts"] for event in events) * _MICRO)
    opened: dict[Any, _Span] = {}
    spans: list[_Span] = []
    for event in events:
        at_us, key = round(event["ts"] * _MICRO), event.get("span_id")
        if event["type"] == "span_start":
            opened[key] = _Span(str(event.get("name")), at_us, at_us, _args(event))
            spans.append(opened[key])
        elif event["type"] == "span_end" and key in opened:
            span = opened.pop(key)
            span.end_us = max(at_us, span.start_us)
            measured = span.args.pop(TRACE_CHILDREN_KEY, None)
            span.args |= _args(event)
            measured = span.args.pop(TRACE_CHILDREN_KEY, measured)
            spans += _measured(measured, span.start_us, span.end_us)
    for span in opened.values():
        span.end_us = max(last_us, span.start_us)
        span.args["unfinished"] = True
    return spans, [event for event in events if event["type"] == "event"]


def _args(event: Mapping[str, Any]) -> dict[str, Any]:
    attrs = event.get("attrs")
    args = {str(k): plain(v) for k, v in attrs.items()} if isinstance(attrs, Mapping) else {}
    if event.get("attempt"):
        args["attempt"] = event["attempt"]
    return args


def _measured(children: Any, start_us: int, end_us: int) -> list[_Span]:
    """Spans that an engine timed itself: known are durations only, so they are laid end to end
    within the span that reported them.
    """
    spans: list[_Span] = []
    for child in children if isinstance(children, list) else ():
        if not isinstance(child, Mapping) or not isinstance(child.get("duration"), int | float):
            continue
        stop_us = min(end_us, start_us + max(0, round(child["duration"] * _MICRO)))
        spans.append(_Span(str(child.get("name")), start_us, stop_us, _args(child)))
        spans += _measured(child.get("children"), start_us, stop_us)
        start_us = stop_us
    return spans


def _track(
    spans: list[_Span], moments: list[Mapping[str, Any]], pid: int, tid: int, name: str
) -> Iterator[dict[str, Any]]:
    lanes: list[list[_Span]] = [[]]
    yield _named("thread_name", pid, tid, name)
    for span in sorted(spans, key=lambda one: (one.start_us, -one.end_us)):
        lane = _lane(lanes, span)
        if lane == len(lanes):
            lanes.append([])
            yield _named("thread_name", pid, tid + lane, f"{name} ({lane + 1})")
        lanes[lane].append(span)
        yield {
            "ph": "X",
            "name": span.name,
            "cat": "span",
            "pid": pid,
            "tid": tid + lane,
            "ts": span.start_us,
            "dur": span.end_us - span.start_us,
            "args": span.args,
        }
    for event in moments:
        yield {
            "ph": "i",
            "s": "t",
            "name": str(event.get("name")),
            "cat": "event",
            "pid": pid,
            "tid": tid,
            "ts": round(event["ts"] * _MICRO),
            "args": _args(event),
        }


def _lane(lanes: list[list[_Span]], span: _Span) -> int:
    """The first lane where the span lies after, or within, all spans that are still open there;
    spans come sorted by their start.
    """
    for number, lane in enumerate(lanes):
        while lane and lane[-1].end_us <= span.start_us:
            lane.pop()
        if not lane or span.end_us <= lane[-1].end_us:
            return number
    # The last lane takes what is left: viewers show it squeezed, which is better than not at all.
    return min(len(lanes), _MOST_LANES - 1)
