"""What a plugin traces is in the samples, and with --trace in a file that viewers open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.unit.observe.test_trace_file import check_chrome_trace

GENERATE = """
from dovetail.observe.trace import trace_event, trace_function, trace_span

async def generate(args, sample, sampling_params):
    from dovetail.types.sample import Sample

    with trace_span(sample, "search", attrs={"query": sample.prompt}) as span:
        sample.append_response_tokens(tokens=[5, 6], log_probs=[-0.5, -0.25], text="23")
        span.set("found", 2)
    trace_event(sample, "answered")
    sample.status = Sample.Status.COMPLETED
    return sample

@trace_function("judge", target="sample")
async def reward(args, sample, **kwargs):
    return 1.0 * (sample.index % 2)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(make_shared(tmp_path), tmp_path)


def _flags(place: Place) -> dict[str, object]:
    code = place.write("traced.py", GENERATE)
    return {
        "custom_generate_function_path": f"{code}:generate",
        "custom_rm_path": f"{code}:reward",
        "eval_prompt_data": ["held_out", place.shared / "rows.jsonl@[0:3]"],
        "eval_interval": 1,
    }


def test_spans_of_a_plugin_are_in_the_trace_of_the_step_beside_those_of_the_run(
    place: Place,
) -> None:
    assert main(place.train(**_flags(place), num_rollout=2, trace=True)) == 0
    files = sorted(path.name for path in (place.run_dir / "trace").iterdir())
    evaluations = [f"eval_{step:06d}.json" for step in range(3)]
    assert files == [*evaluations, "step_000001.json", "step_000002.json"]
    document = json.loads((place.run_dir / "trace" / "step_000002.json").read_bytes())
    check_chrome_trace(document)
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    names = [event["name"] for event in spans]
    assert [n for n in names if n in ("rollout", "train", "publish")] == [
        "rollout",
        "train",
        "publish",
    ]
    for name in ("generate", "search", "reward", "judge"):
        assert names.count(name) == 4
    search = next(event for event in spans if event["name"] == "search")
    assert search["args"]["found"] == 2 and search["args"]["query"].endswith("=")
    generate = next(event for event in spans if event["name"] == "generate")
    rollout = next(event for event in spans if event["name"] == "rollout")
    assert rollout["ts"] <= generate["ts"] <= search["ts"]
    assert search["ts"] + search["dur"] <= generate["ts"] + generate["dur"]
    assert generate["ts"] + generate["dur"] <= rollout["ts"] + rollout["dur"]
    held_out = json.loads((place.run_dir / "trace" / evaluations[0]).read_bytes())
    check_chrome_trace(held_out)
    labels = {e["args"]["name"] for e in held_out["traceEvents"] if e["ph"] == "M"}
    assert {"run", "held_out", "sample 0", "sample 2"} <= labels


def test_without_the_flag_only_what_the_plugin_traced_is_kept_and_only_on_its_samples(
    place: Place,
) -> None:
    assert main(place.train(**_flags(place))) == 0
    assert not (place.run_dir / "trace").exists()
    lines = (place.run_dir / "samples" / "step_000001.jsonl").read_text().splitlines()
    for line in lines:
        events = json.loads(line)["trace"]["events"]
        named = [(event["type"], event["name"]) for event in events]
        assert named == [
            ("span_start", "search"),
            ("span_end", "search"),
            ("event", "answered"),
            ("span_start", "judge"),
            ("span_end", "judge"),
        ]
