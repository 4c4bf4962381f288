"""Training runs whose samples come from agents, each in a session of the run's own server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dovetail.cli.main import main
from dovetail.observe.dump import read_samples
from dovetail.observe.run_dir import RunDir
from dovetail.types import Sample
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import read_metrics

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
MILES = """
import json
from pathlib import Path

from miles.utils.http_utils import post

SEEN = Path(__file__).with_name("seen.jsonl")


async def run_agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    messages = list(prompt)
    for turn in range(2):
        payload = {"model": "default", "messages": messages, "logprobs": True, **request_kwargs}
        payload["return_token_ids"] = True
        answer = await post(f"{base_url}/v1/chat/completions", payload)
        (choice,) = answer["choices"]
        logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
        known = [metadata["session_id"], choice["token_ids"], logprobs]
        with SEEN.open("a") as file:
            file.write(json.dumps(known) + "\\n")
        messages += [choice["message"], {"role": "user", "content": "again"}]
    return {"turns": turn + 1}


async def abort(args):
    with SEEN.with_name("aborted").open("a") as file:
        file.write("x")


def pick(samples, metadata):
    assert metadata["tree"]["leaves"] and metadata["agent"] == {"turns": 2}
    return samples


def finish(samples, metadata):
    for sample in samples:
        sample.metadata["finished"] = len(metadata["tree"]["nodes"])
    return samples


def same(recorded, sent):
    return recorded["role"] == sent["role"]
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_shared(tmp_path_factory.mktemp("shared"))
    (directory / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["input"] = [{"role": "user", "content": row["input"]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines)
    return directory


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def _train(place: Place, **changes: object) -> list[str]:
    user = place.write("miles_agent.py", MILES)
    return place.train(
        check_hooks=False,
        custom_generate_function_path="miles.rollout.generate_hub.agentic_tool_call.generate",
        custom_agent_function_path=f"{user}:run_agent",
        **changes,
    )


def _trained(place: Place, steps: int) -> list[Sample]:
    found = RunDir(place.run_dir)
    return [one for step in range(1, steps + 1) for one in read_samples(found.samples(step))]


def _sampled(sample: Sample) -> tuple[list[int], list[float]]:
    response = sample.tokens[sample.prompt_length :]
    masks, logprobs = sample.loss_mask or [], sample.rollout_log_probs or []
    trained = [place for place, mask in enumerate(masks) if mask]
    return [response[i] for i in trained], [logprobs[i] for i in trained]


def test_an_agent_written_for_miles_trains_on_the_tokens_it_was_answered(place: Place) -> None:
    user = place.own / "miles_agent.py"
    flags = _train(
        place,
        num_rollout=2,
        use_session_server=True,
        tito_model="qwen3",
        session_sample_picker_path=f"{user}:pick",
        session_sample_postprocessor_path=f"{user}:finish",
        session_message_matcher=f"{user}:same",
        rollout_max_response_len=8,
    )
    assert main(flags) == 0
    lines = (place.own / "seen.jsonl").read_text().splitlines()
    answered: dict[str, list[list[list[float]]]] = {}
    for session_id, tokens, logprobs in map(json.loads, lines):
        answered.setdefault(session_id, []).append([tokens, logprobs])
    trained = _trained(place, 2)
    assert len(trained) == len(answered) == 8
    for sample in trained:
        turns = answered[str(sample.session_id)]
        tokens, logprobs = _sampled(sample)
        assert tokens == [one for turn, _ in turns for one in turn]
        assert logprobs == [one for _, turn in turns for one in turn]
        assert sample.metadata["turns"] == sample.metadata["finished"] == 2
    assert {version for sample in trained for version in sample.weight_versions} == {"0", "1"}
    assert all(row["train/grad_norm"] > 0 for row in read_metrics(place.run_dir))


@pytest.mark.parametrize("partial", [False, True], ids=["discarded", "put back"])
def test_a_step_that_is_full_ends_the_agents_that_are_left(place: Place, partial: bool) -> None:
    flags = _train(
        place,
        num_rollout=2,
        over_sampling_batch_size=6,
        partial_rollout=partial,
        rollout_max_response_len=60,
    )
    assert main(flags) == 0
    trained = _trained(place, 2)
    assert len(trained) == 8 and all(sample.status.value != "aborted" for sample in trained)
    # Once for each step that ended before its agents.
    assert (place.own / "aborted").read_text() in ("x", "xx")
    rows = [row for row in read_metrics(place.run_dir) if "rollout/reward" in row]
    assert len(rows) == 2


def test_an_agent_without_its_generate_function_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = _train(place)
    at = flags.index("--custom-generate-function-path")
    assert main(flags[:at] + flags[at + 2 :]) == 2
    assert "--custom-generate-function-path agent" in capsys.readouterr().err
    assert main([*_train(place), "--serve-router", "false"]) == 2
    assert "a session server" in capsys.readouterr().err
    assert main([*_train(place), "--agent-timeout-s", "9999"]) == 2
    assert "agent_timeout_s 9999 is not below generate_timeout_s" in capsys.readouterr().err
