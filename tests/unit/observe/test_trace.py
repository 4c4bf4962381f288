import asyncio
import copy
import json
import pickle
from pathlib import Path

import numpy
import pytest

from dovetail.observe.dump import read_samples, write_samples
from dovetail.observe.trace import (
    TRACE_CHILDREN_KEY,
    bind_trace,
    export_trace,
    import_trace,
    recording_run,
    run_span,
    trace_event,
    trace_function,
    trace_next_attempt,
    trace_span,
)
from dovetail.observe.trace_meta import build_sglang_meta_trace_attrs, build_vllm_meta_trace_attrs
from dovetail.types.sample import Sample


def _events(sample: Sample) -> list[dict]:
    return sample.trace["events"]


def _kinds(sample: Sample) -> list[tuple[str, str]]:
    return [(event["type"], event["name"]) for event in _events(sample)]


def test_a_span_is_two_events_with_the_attributes_of_its_start_and_of_its_end() -> None:
    sample = Sample()
    with trace_span(sample, "search", attrs={"query": "cats"}) as span:
        span.set("found", 3)
        span.update({"best": 0.5})
    start, end = _events(sample)
    assert (start["type"], end["type"]) == ("span_start", "span_end")
    assert start["name"] == end["name"] == "search" and start["span_id"] == end["span_id"]
    assert start["attrs"] == {"query": "cats"} and end["attrs"] == {"found": 3, "best": 0.5}
    assert 1.7e9 < start["ts"] <= end["ts"]


def test_spans_know_the_one_around_them_also_across_awaits_and_tasks() -> None:
    sample = Sample()

    async def inner() -> None:
        with trace_span(sample, "inner"):
            await asyncio.sleep(0)

    async def outer() -> None:
        with trace_span(sample, "outer"):
            await asyncio.gather(inner(), inner())

    asyncio.run(outer())
    starts = [event for event in _events(sample) if event["type"] == "span_start"]
    outer_id = starts[0]["span_id"]
    assert "parent_span_id" not in starts[0]
    assert [event["parent_span_id"] for event in starts[1:]] == [outer_id, outer_id]
    assert len({event["span_id"] for event in starts}) == 3


def test_a_span_on_one_sample_is_no_parent_of_a_span_on_another() -> None:
    one, other = Sample(), Sample()
    with trace_span(one, "one"), trace_span(other, "other"):
        pass
    assert "parent_span_id" not in _events(other)[0]


def test_a_group_is_traced_on_each_of_its_samples_however_nested() -> None:
    group = [[Sample(index=0), Sample(index=1)], Sample(index=2)]
    with trace_span(group, "judge"):
        trace_event(group, "asked")
    for sample in (*group[0], group[1]):
        assert _kinds(sample) == [
            ("span_start", "judge"),
            ("event", "asked"),
            ("span_end", "judge"),
        ]


def test_an_exception_passes_through_and_is_noted_unless_told_not_to() -> None:
    sample = Sample()
    for record_error in (True, False):
        with (
            pytest.raises(ValueError, match="no cats"),
            trace_span(sample, "search", record_error=record_error),
        ):
            raise ValueError("no cats")
    first, second = (event for event in _events(sample) if event["type"] == "span_end")
    assert first["attrs"] == {"error": "ValueError: no cats"} and "attrs" not in second


def test_a_function_is_traced_on_its_named_parameter() -> None:
    @trace_function("judge", target="sample", attrs_getter=lambda args, sample: {"of": args})
    def judge(args: str, sample: Sample) -> int:
        return 7

    sample = Sample()
    assert judge("x", sample=sample) == 7 and judge.__name__ == "judge"
    assert _kinds(sample) == [("span_start", "judge"), ("span_end", "judge")]
    assert _events(sample)[0]["attrs"] == {"of": "x"}


def test_an_async_function_is_traced_until_it_has_ended_and_stays_async() -> None:
    seen: list[list] = []

    @trace_function("judge", target_getter=lambda args, group: group)
    async def judge(args: None, group: list[Sample]) -> float:
        await asyncio.sleep(0)
        seen.append(_kinds(group[0]))
        return 1.0

    group = [Sample(), Sample()]
    assert asyncio.iscoroutinefunction(judge)
    assert asyncio.run(judge(None, group)) == 1.0
    assert seen == [[("span_start", "judge")]] and len(_events(group[1])) == 2


def test_without_a_target_the_first_sample_or_the_enclosing_span_is_taken() -> None:
    @trace_function("with_sample")
    def with_sample(args: int, sample: Sample) -> None:
        without()

    @trace_function("without")
    def without() -> None:
        pass

    sample = Sample()
    with_sample(1, sample)
    without()
    assert [name for _, name in _kinds(sample)] == [
        "with_sample",
        "without",
        "without",
        "with_sample",
    ]


def test_what_can_not_be_recorded_costs_nothing() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no text")

    sample = Sample()
    with trace_span(None, "nothing") as span:
        span.set("a", 1)
    with trace_span(object(), "no sample"):
        pass
    with trace_span([sample, 3], "one of two", attrs=17) as span:  # type: ignore[arg-type]
        span.update(5)  # type: ignore[arg-type]
    trace_event(sample, "odd", attrs={"value": Odd()})
    assert bind_trace(None) is None and import_trace("text") is None  # type: ignore[arg-type]

    @trace_function("getter", target_getter=lambda: 1 / 0)
    def work(sample: Sample) -> str:
        return "done"

    assert work(sample) == "done"
    assert ("span_end", "one of two") in _kinds(sample)


def test_attributes_are_json_whatever_was_given() -> None:
    sample = Sample()
    attrs = {
        "nan": float("nan"),
        "array": numpy.float32(0.5),
        "set": {3},
        7: "key",
        "long": "x" * 5_000,
        "path": Path("/tmp"),
    }
    trace_event(sample, "all", attrs=attrs)
    got = json.loads(json.dumps(sample.trace))["events"][0]["attrs"]
    assert got["nan"] == "nan" and got["array"] == 0.5 and got["set"] == [3] and got["7"] == "key"
    assert len(got["long"]) < 2_100 and "/tmp" in got["path"]


def test_a_trace_travels_with_its_sample(tmp_path: Path) -> None:
    sample = Sample(index=1, tokens=[1], response_length=1)
    trace_event(sample, "seen")
    back = (
        Sample.from_dict(sample.to_dict()),
        copy.deepcopy(sample),
        pickle.loads(pickle.dumps(sample)),
        read_samples(write_samples(tmp_path / "samples.jsonl", [sample]))[0],
    )
    for other in back:
        assert other.trace == sample.trace


def test_another_process_goes_on_under_the_span_that_sent_it() -> None:
    sample = Sample()
    with trace_span(sample, "here"):
        sent = json.loads(json.dumps(export_trace(sample)))
    handle = import_trace(sent)
    assert handle is not None and handle.trace_id == sample.trace["trace_id"]
    with trace_span(handle, "there"):
        pass
    here, *_, start, _ = handle.carrier["events"]
    assert start["name"] == "there" and start["parent_span_id"] == here["span_id"]
    assert len(_events(sample)) == 2


def test_attempts_are_counted() -> None:
    sample = Sample()
    trace_event(sample, "before")
    trace_next_attempt(sample, attrs={"why": "aborted"})
    trace_event(sample, "after")
    assert [event["attempt"] for event in _events(sample)] == [0, 1, 1]
    assert sample.trace["attempt"] == 1


def test_a_loop_that_traces_for_ever_does_not_fill_the_memory() -> None:
    sample = Sample()
    with trace_span(sample, "all"):
        for _ in range(10_500):
            trace_event(sample, "one")
    assert len(_events(sample)) == 10_001 and sample.trace["dropped"] == 501
    assert _kinds(sample)[-1] == ("span_end", "all")


def test_our_own_stages_are_recorded_only_when_asked_for() -> None:
    sample = Sample()
    with run_span(sample, "generate"):
        pass
    assert not hasattr(sample, "trace")
    with recording_run(True), run_span(sample, "generate"):
        pass
    assert len(_events(sample)) == 2


def test_attributes_of_an_sglang_answer() -> None:
    meta = {
        "prompt_tokens": 12,
        "completion_tokens": 7,
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [],
        "pd_prefill_forward_duration": 0.25,
        "pd_prefill_queue_duration": 0.5,
    }
    attrs = build_sglang_meta_trace_attrs(meta)
    (prefill,) = attrs.pop(TRACE_CHILDREN_KEY)
    assert attrs == {"prompt_tokens": 12, "completion_tokens": 7, "finish_reason": "stop"}
    assert prefill["name"] == "sglang_pd_prefill" and prefill["duration"] == 0.75
    assert prefill["children"][0]["attrs"] == {"pd_prefill_forward_duration": 0.25}
    assert build_sglang_meta_trace_attrs(None) == {}


def test_attributes_of_a_vllm_answer_in_its_own_form_and_as_meta_info() -> None:
    answer = {
        "choices": [{"finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 12,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    wanted = {
        "prompt_tokens": 12,
        "completion_tokens": 7,
        "cached_tokens": 3,
        "finish_reason": "length",
    }
    assert build_vllm_meta_trace_attrs(answer) == wanted
    meta = {**wanted, "finish_reason": {"type": "length"}, "pd_decode_transfer_duration": 0.05}
    attrs = build_vllm_meta_trace_attrs(meta)
    assert attrs.pop(TRACE_CHILDREN_KEY)[0]["name"] == "vllm_pd_decode" and attrs == wanted
