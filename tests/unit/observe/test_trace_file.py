import json
from collections import defaultdict
from pathlib import Path

from dovetail.observe.trace import TRACE_CHILDREN_KEY, trace_event, trace_span
from dovetail.observe.trace_file import Phase, trace_events, write_trace
from dovetail.types.sample import Sample


def check_chrome_trace(document: dict) -> None:
    """What a viewer relies on: the format's own rules for phases M, X and i."""
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    named = set()
    for event in document["traceEvents"]:
        assert event["ph"] in "MXi" and isinstance(event["name"], str)
        assert all(isinstance(event[key], int) for key in ("pid", "tid", "ts"))
        if event["ph"] == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
            named.add((event["name"], event["pid"], event["tid"]))
        else:
            assert event["s"] == "t"
    for pid, tid in tracks:
        assert ("process_name", pid, 0) in named and ("thread_name", pid, tid) in named
    for spans in tracks.values():
        _check_nesting(spans)


def _check_nesting(spans: list[tuple[int, int]]) -> None:
    for place, (start, end) in enumerate(spans):
        for other_start, other_end in spans[place + 1 :]:
            apart = other_start >= end or other_end <= start
            inside = start <= other_start and other_end <= end
            assert apart or inside or (other_start <= start and end <= other_end)


def _span(name: str, start: float, end: float | None, span_id: str, **end_attrs: object) -> list:
    events = [{"type": "span_start", "name": name, "ts": start, "span_id": span_id}]
    if end is not None:
        events.append(
            {"type": "span_end", "name": name, "ts": end, "span_id": span_id, "attrs": end_attrs}
        )
    return events


def _sample(index: int, *spans: list) -> Sample:
    sample = Sample(index=index)
    events = [event for events in spans for event in events]
    sample.trace = {"version": 1, "trace_id": "t", "attempt": 0, "events": events}
    return sample


def _complete(sample: Sample) -> list[dict]:
    return [e for e in trace_events([("group 0", [sample])]) if e["ph"] == "X"]


def test_a_file_names_the_run_the_groups_and_the_samples(tmp_path: Path) -> None:
    one, other, silent = Sample(index=4), Sample(index=5), Sample(index=6)
    with trace_span([one, other], "search", attrs={"k": 3}):
        trace_event(one, "hit")
    groups = [("group 2", [one, other]), ("group 3", [silent])]
    path = write_trace(tmp_path / "trace" / "step.json", groups, [Phase("rollout", 100.0, 2.0)])
    document = json.loads(path.read_bytes())
    check_chrome_trace(document)
    events = document["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["run", "loop", "group 2", "sample 4", "sample 5"]
    rollout, *searches = (event for event in events if event["ph"] == "X")
    assert (rollout["name"], rollout["ts"], rollout["dur"]) == ("rollout", 100_000_000, 2_000_000)
    assert [event["args"] for event in searches] == [{"k": 3}, {"k": 3}]
    (hit,) = (event for event in events if event["ph"] == "i")
    assert hit["name"] == "hit" and hit["tid"] == searches[0]["tid"]


def test_times_are_microseconds_and_attributes_of_both_ends_are_together() -> None:
    (event,) = _complete(_sample(0, _span("a", 10.0, 10.25, "1", found=2)))
    assert (event["ts"], event["dur"], event["args"]) == (10_000_000, 250_000, {"found": 2})


def test_spans_that_nest_share_a_track_and_those_that_overlap_do_not() -> None:
    sample = _sample(
        0,
        _span("outer", 0.0, 10.0, "1"),
        _span("inner", 1.0, 2.0, "2"),
        _span("late", 9.0, 12.0, "3"),
        _span("after", 10.0, 11.0, "4"),
    )
    tids = {event["name"]: event["tid"] for event in _complete(sample)}
    assert tids["outer"] == tids["inner"] == tids["after"] != tids["late"]
    document = {
        "traceEvents": list(trace_events([("g", [sample])])),
        "displayTimeUnit": "ms",
    }
    check_chrome_trace(document)


def test_a_span_without_an_end_goes_on_to_the_last_event() -> None:
    sample = _sample(0, _span("cut off", 1.0, None, "1"), _span("other", 2.0, 3.0, "2"))
    first = _complete(sample)[0]
    assert first["dur"] == 2_000_000 and first["args"] == {"unfinished": True}


def test_durations_that_an_engine_reports_lie_end_to_end_within_their_span() -> None:
    children = [
        {"name": "prefill", "duration": 0.5, "attrs": {}, "children": []},
        {"name": "decode", "duration": 9.0, "attrs": {"n": 1}},
    ]
    events = _complete(_sample(0, _span("ask", 1.0, 3.0, "1", **{TRACE_CHILDREN_KEY: children})))
    assert [(e["name"], e["ts"], e["dur"]) for e in events] == [
        ("ask", 1_000_000, 2_000_000),
        ("prefill", 1_000_000, 500_000),
        ("decode", 1_500_000, 1_500_000),
    ]


def test_a_trace_that_a_plugin_broke_is_passed_over() -> None:
    broken = [Sample(index=i) for i in range(3)]
    broken[0].trace = "text"
    broken[1].trace = {"events": "text"}
    broken[2].trace = {"events": [3, {"type": "span_end", "ts": 1.0}, {"ts": None, "type": "x"}]}
    assert not [e for e in trace_events([("g", broken)]) if e["ph"] != "M"]
