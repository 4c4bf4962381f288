"""Training runs whose generate functions know the engine by its address only, as slime's and vime's
do: what they are answered is what is trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from dovetail.observe.dump import read_samples
from dovetail.observe.run_dir import RunDir
from dovetail.types import Sample
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import read_metrics

SLIME = """
import json
from pathlib import Path
import aiohttp
from transformers import AutoTokenizer

ANSWERS = Path(__file__).with_name("answers.jsonl")


async def generate(args, sample, sampling_params):
    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sample.tokens = sample.tokens or tokenizer.encode(sample.prompt)
    sampling_params["max_new_tokens"] -= sample.response_length
    body = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
    async with aiohttp.ClientSession() as client, client.post(url, json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    with ANSWERS.open("a") as file:
        file.write(json.dumps({"index": sample.index, **answer}) + "\\n")
    pairs = answer["meta_info"]["output_token_logprobs"]
    sample.tokens = sample.tokens + [token for _, token, _ in pairs]
    sample.response_length += len(pairs)
    sample.response += answer["text"]
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [value for value, *_ in pairs]
    sample.weight_versions.append(answer["meta_info"]["weight_version"])
    kinds = {"stop": "COMPLETED", "length": "TRUNCATED", "abort": "ABORTED"}
    sample.status = sample.Status[kinds[answer["meta_info"]["finish_reason"]["type"]]]
    return sample
"""
VIME = """
import aiohttp
from transformers import AutoTokenizer


async def generate(args, sample, sampling_params):
    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
    url = f"http://{args.vllm_router_ip}:{args.vllm_router_port}/inference/v1/generate"
    sample.tokens = tokenizer.encode(sample.prompt)
    body = {
        "model": args.hf_checkpoint,
        "token_ids": sample.tokens,
        "sampling_params": {
            "max_tokens": sampling_params["max_new_tokens"],
            "temperature": sampling_params["temperature"],
            "seed": sampling_params["sampling_seed"],
            "include_stop_str_in_output": True,
            "logprobs": 1,
        },
    }
    async with aiohttp.ClientSession() as client, client.post(url, json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
    (choice,) = answer["choices"]
    values = [one["logprob"] for one in choice["logprobs"]["content"]]
    sample.append_response_tokens(
        tokens=choice["token_ids"],
        log_probs=values,
        text=tokenizer.decode(choice["token_ids"]),
        meta_info={
            "finish_reason": choice["finish_reason"], "weight_version": answer["weight_version"]
        },
    )
    sample.metadata["answer"] = [choice["token_ids"], values]
    return sample
"""
BLOCKING = """
import urllib.request, json


async def generate(args, sample, sampling_params):
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    body = json.dumps({"text": sample.prompt, "sampling_params": {"max_new_tokens": 2}}).encode()
    try:
        urllib.request.urlopen(urllib.request.Request(url, body)).read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.loads(error.read())["message"])
    return sample
"""
MIDDLEWARE = """
import json


class Count:
    def __init__(self, app, *, router):
        self.seen = 0

    async def dispatch(self, request, call_next):
        self.seen += 1
        number = str(self.seen)
        response = await call_next(request)
        response.headers["x-seen"] = number
        response.headers["x-way"] = "class " + response.headers["x-way"]
        return response


class Plain:
    def __init__(self, app, *, router):
        self.app, self.args = app, router.args

    async def __call__(self, scope, receive, send):
        async def marked(message):
            if message["type"] == "http.response.start":
                way = [value for name, value in message["headers"] if name == b"x-way"][0]
                message["headers"] = [one for one in message["headers"] if one[0] != b"x-way"]
                way = b"asgi " + str(self.args.num_rollout).encode() + b" " + way
                message["headers"].append((b"x-way", way))
            await send(message)

        await self.app(scope, receive, marked)


async def function(request, call_next):
    response = await call_next(request)
    response.headers["x-way"] = "function"
    return response
"""
WRONG = """
from slime.utils.http_utils import post


async def generate(args, sample, sampling_params):
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    params = {"max_new_token": 4}
    return await post(url, {"text": sample.prompt, "sampling_params": params})
"""
RADIX = """
from slime.router.middleware_hub.radix_tree_middleware import postprocess_sample_with_radix_tree
from slime.utils.http_utils import post


async def generate(args, sample, sampling_params):
    assert args.use_slime_router and args.slime_router_middleware_paths
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sampling_params |= {"max_new_tokens": 4, "ignore_eos": True}
    made = []
    for turn in range(2):
        text = sample.prompt + sample.response
        output = await post(url, {"text": text, "sampling_params": sampling_params})
        pairs = output["meta_info"]["output_token_logprobs"]
        made.append([[token, value] for value, token, _ in pairs])
        answer = output if turn else output["text"]
        sample = await postprocess_sample_with_radix_tree(args, sample, answer)
        sample.response += " and" * (turn == 0)
    if not args.rehearsal:
        sample.metadata["made"] = made
    sample.status = sample.Status.COMPLETED
    sample.weight_versions.append(output["meta_info"]["weight_version"])
    return sample
"""
PARITY = "def rm(sample):\n    return sample.index % 2\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def _train(place: Place, **changes: object) -> list[str]:
    """Without a rehearsal: its answers would be among the run's."""
    return place.train(**{"check_hooks": False, **changes})


def _trained(place: Place, steps: int) -> list[Sample]:
    found = RunDir(place.run_dir)
    return [one for step in range(1, steps + 1) for one in read_samples(found.samples(step))]


def _answers(place: Place) -> list[dict[str, Any]]:
    lines = (place.own / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_tokens_and_logprobs_that_a_slime_function_was_answered_are_those_trained_on(
    place: Place,
) -> None:
    user = place.write("user.py", SLIME)
    flags = _train(
        place,
        num_rollout=3,
        custom_generate_function_path=f"{user}:generate",
        custom_rm_path=place.write("rm.py", PARITY) + ":rm",
        lr=1e-3,
    )
    assert main(flags) == 0
    trained, answers = _trained(place, 3), {one["index"]: one for one in _answers(place)}
    assert len(trained) == len(answers) == 12
    for sample in trained:
        pairs = answers[sample.index]["meta_info"]["output_token_logprobs"]
        assert sample.tokens[-sample.response_length :] == [token for _, token, _ in pairs]
        assert sample.rollout_log_probs == [value for value, *_ in pairs]
        assert all(value < 0 for value in sample.rollout_log_probs)
    # Each step is sampled under the weights that the step before it left.
    assert [sample.weight_versions for sample in trained] == [["0"]] * 4 + [["1"]] * 4 + [["2"]] * 4
    assert all(row["train/grad_norm"] > 0 for row in read_metrics(place.run_dir))


def test_tokens_and_logprobs_that_a_vime_function_was_answered_are_those_trained_on(
    place: Place,
) -> None:
    user = place.write("user.py", VIME)
    flags = _train(place, custom_generate_function_path=f"vime:{user}:generate")
    assert main(flags) == 0
    for sample in _trained(place, 1):
        tokens, values = sample.metadata["answer"]
        assert sample.tokens[-sample.response_length :] == tokens
        assert sample.rollout_log_probs == values


def test_what_a_foreign_function_had_when_the_step_was_full_is_trained_on_later(
    place: Place,
) -> None:
    user = place.write("user.py", SLIME)
    flags = _train(
        place,
        num_rollout=4,
        custom_generate_function_path=f"{user}:generate",
        partial_rollout=True,
        over_sampling_batch_size=6,
        rollout_max_response_len=120,
        custom_rm_path=place.write("rm.py", PARITY) + ":rm",
    )
    assert main(flags) == 0
    by_index: dict[int, list[dict[str, Any]]] = {}
    for answer in _answers(place):
        by_index.setdefault(answer["index"], []).append(answer)
    cut = {
        index
        for index, answers in by_index.items()
        if answers[0]["meta_info"]["finish_reason"]["type"] == "abort" and answers[0]["output_ids"]
    }
    resumed = [sample for sample in _trained(place, 4) if sample.index in cut]
    assert resumed
    for sample in resumed:
        answered = [one for answer in by_index[sample.index] for one in answer["output_ids"]]
        assert sample.tokens[-sample.response_length :] == answered
        assert len(sample.weight_versions) == len(by_index[sample.index])


def test_a_function_that_blocks_the_loop_it_waits_for_is_told_where(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dovetail.router import crossing

    monkeypatch.setattr(crossing, "BLOCKED_AFTER_S", 1.0)
    user = place.write("user.py", BLOCKING)
    flags = _train(
        place,
        custom_generate_function_path=f"{user}:generate",
        max_failed_groups=1,
    )
    assert main(flags) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "has not reacted" in said
    assert "user.py:9" in said


def test_evaluation_alone_serves_the_engine_too(place: Place) -> None:
    user = place.write("user.py", SLIME)
    flags = place.flags(
        custom_generate_function_path=f"{user}:generate",
        num_rollout=None,
        eval_prompt_data=["held", str(place.shared / "rows.jsonl")],
    )
    assert main(["eval", *flags]) == 0
    assert len(_answers(place)) > 0
    assert "eval/held/reward" in read_metrics(place.run_dir)[0]


def test_middleware_stands_before_every_request_in_the_order_of_its_names(place: Place) -> None:
    function = SLIME.replace(
        "answer = await response.json()",
        'answer = {**await response.json(), "seen": response.headers["x-seen"], '
        '"way": response.headers["x-way"]}',
    )
    middle = place.write("middle.py", MIDDLEWARE)
    user = place.write("user.py", function)
    flags = _train(
        place,
        custom_generate_function_path=f"{user}:generate",
        router_middleware_paths=[f"{middle}:Count", f"{middle}:Plain", f"{middle}:function"],
        # The functions write down every call, those of a rehearsal too.
        check_hooks=False,
    )
    assert main(flags) == 0
    assert sorted(answer["seen"] for answer in _answers(place)) == ["1", "2", "3", "4"]
    assert {answer["way"] for answer in _answers(place)} == {"class asgi 1 function"}


@pytest.mark.parametrize("family", ["slime", "miles"])
def test_a_function_that_handles_texts_only_trains_on_what_was_sampled(
    family: str, place: Place
) -> None:
    user = place.write("user.py", RADIX.replace("slime", family))
    module = f"{family}.router.middleware_hub.radix_tree_middleware"
    flags = place.train(
        custom_generate_function_path=f"{user}:generate",
        **{f"{family}_router_middleware_paths": f"{module}.RadixTreeMiddleware"},
    )
    assert main([*flags, f"--use-{family}-router"]) == 0
    trained = _trained(place, 1)
    assert len(trained) == 4
    for sample in trained:
        first, second = sample.metadata["made"]
        assert sample.loss_mask is not None and sample.rollout_log_probs is not None
        between = sample.loss_mask.count(0)
        assert between and sample.loss_mask == [1] * 4 + [0] * between + [1] * 4
        response = sample.tokens[-sample.response_length :]
        pairs = [list(pair) for pair in zip(response, sample.rollout_log_probs, strict=True)]
        assert pairs[:4] == first and pairs[-4:] == second
        assert {value for _, value in pairs[4:-4]} == {0.0}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (WRONG, "sampling_params.max_new_token: no such field; did you mean"),
        (WRONG.replace("/generate", "/generat"), "/generat: no such path"),
    ],
)
def test_a_wrong_field_or_path_reaches_the_user_at_once(
    code: str, says: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    user = place.write("user.py", code)
    flags = _train(place, custom_generate_function_path=f"{user}:generate", max_failed_groups=1)
    assert main(flags) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
