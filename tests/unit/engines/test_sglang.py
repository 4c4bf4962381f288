"""What the client of SGLang says, and how it reads answers: command lines, experts, groups of
weights, answers that are wrong."""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.engines.launch import LaunchSettings
from dovetail.engines.sglang import launch as launching
from dovetail.engines.sglang import wire
from dovetail.engines.sglang.weights import TensorFacts, WeightGroups
from dovetail.types import (
    ConfigError,
    EngineError,
    FinishReason,
    GenerateRequest,
    MissingExtraError,
)
from dovetail.types.calls import SamplingParams, ScoreRequest, VersionSpan
from dovetail.types.errors import RequestRefusedError
from tests.sglang_schema import problems_of_generate
from tests.sglang_server import SglangServer
from tests.unit.engines.tiny import tiny_engine


def request(**changes: Any) -> GenerateRequest:
    return GenerateRequest("r", (5, 6), SamplingParams(max_new_tokens=4), **changes)


def answer(**meta: Any) -> dict[str, Any]:
    given = {
        "finish_reason": {"type": "length", "length": 2},
        "weight_version": "3",
        "completion_tokens": 2,
        "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, "x"]],
    }
    return {"text": "ab", "output_ids": [7, 8], "meta_info": {**given, **meta}}


def test_an_answer_is_read() -> None:
    spans = [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}]
    found = wire.generate_result(request(), answer(weight_versions=spans, cached_tokens=1), None)
    assert (found.token_ids, found.logprobs, found.text) == ([7, 8], [-0.5, -0.25], "ab")
    assert found.version_spans == (VersionSpan(2, 0, 1), VersionSpan(3, 1, 2))
    assert (found.finish_reason, found.prompt_tokens) == (FinishReason.LENGTH, 2)
    assert found.cached_tokens == 1


def test_without_spans_all_tokens_have_the_one_version() -> None:
    found = wire.generate_result(request(), answer(), None)
    assert found.version_spans == (VersionSpan(3, 0, 2),)
    unset = wire.generate_result(request(), answer(weight_version="default"), None)
    assert unset.version_spans == (VersionSpan(0, 0, 2),)


def test_what_was_aborted_before_it_ran_has_no_tokens() -> None:
    gone = {"finish_reason": {"type": "abort", "message": "x"}, "completion_tokens": 0}
    body = answer(**gone)
    del body["meta_info"]["output_token_logprobs"]
    found = wire.generate_result(request(return_routed_experts=True), body, None)
    assert (found.token_ids, found.finish_reason) == ([], FinishReason.ABORT)
    assert found.version_spans == () and found.routed_experts is None


WRONG = {
    "no meta_info": {"text": ""},
    "a list": [1],
    "other counts": answer(completion_tokens=3),
    "a token that is no number": answer(output_token_logprobs=[[-0.5, "7", None]]),
    "no pairs": answer(output_token_logprobs=[-0.5, 7]),
    "an unknown reason": answer(finish_reason={"type": "tired"}),
    "no reason": answer(finish_reason=None),
    "a version that is none": answer(weight_version="v3"),
    "spans with a hole": answer(weight_versions=[{"version": "3", "start": 1, "end": 2}]),
    "spans beyond the end": answer(weight_versions=[{"version": "3", "start": 0, "end": 5}]),
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_an_answer_that_is_none_counts_as_an_engine_that_is_gone(body: Any) -> None:
    with pytest.raises(wire.MalformedAnswerError, match="request 'r'"):
        wire.generate_result(request(), body, None)


def test_figures_that_are_not_finite_are_no_logprobs() -> None:
    for bad in (None, float("nan"), float("-inf")):
        pairs = [[-0.5, 7, None], [bad, 8, None]]
        with pytest.raises(EngineError, match="not finite; its weights of version 3") as found:
            wire.generate_result(request(), answer(output_token_logprobs=pairs), None)
        assert not isinstance(found.value, wire.MalformedAnswerError)


def test_experts_are_those_of_the_layers_that_have_them() -> None:
    layers, top_k = 4, 2
    every = np.arange(3 * layers * top_k, dtype=np.int32).reshape(3, layers, top_k)
    packed = base64.b64encode(every.tobytes()).decode()
    config = {"num_hidden_layers": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 2]}
    asked = request(return_routed_experts=True)
    found = wire.generate_result(
        asked, answer(routed_experts=packed), None, wire.expert_shape(config)
    )
    assert np.array_equal(found.routed_experts, every[:, [1, 3]])
    shape = {"routed_experts": packed, "routed_experts_shape": [3, 2, 4]}
    found = wire.generate_result(asked, answer(**shape), None)
    assert np.array_equal(found.routed_experts, every.reshape(3, 2, 4))


def test_experts_that_do_not_come_or_do_not_fit_are_an_error() -> None:
    asked = request(return_routed_experts=True)
    packed = base64.b64encode(np.zeros(3 * 4 * 2, np.int32).tobytes()).decode()
    with pytest.raises(RequestRefusedError, match="--enable-return-routed-experts"):
        wire.generate_result(asked, answer(), None)
    with pytest.raises(RequestRefusedError, match=r"config\.json"):
        wire.generate_result(asked, answer(routed_experts=packed), None)
    for wrong in ((3, (0, 1, 2), 2), (5, (0,), 2)):
        with pytest.raises(wire.MalformedAnswerError):
            wire.generate_result(asked, answer(routed_experts=packed), None, wrong)
    with pytest.raises(wire.MalformedAnswerError, match="routed_experts"):
        wire.generate_result(asked, answer(routed_experts="?"), None, (4, (0,), 2))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"num_hidden_layers": 3, "num_experts_per_tok": 8}, (3, (0, 1, 2), 8)),
        (
            {"num_hidden_layers": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
            (4, (1, 2, 3), 2),
        ),
        (
            {"num_hidden_layers": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
            (4, (1, 3), 2),
        ),
        ({"text_config": {"num_hidden_layers": 1, "num_experts_per_tok": 2}}, (1, (0,), 2)),
        ({"num_hidden_layers": 4}, None),
    ],
)
def test_a_config_says_which_layers_have_experts(config: dict[str, Any], shape: Any) -> None:
    assert wire.expert_shape(config) == shape


def test_every_setting_of_a_request_is_one_that_sglang_has() -> None:
    sampling = SamplingParams(
        max_new_tokens=9,
        min_new_tokens=12,
        temperature=0.0,
        top_p=0.5,
        top_k=2**31,
        min_p=0.1,
        stop=("a", "b"),
        stop_token_ids=(4,),
        ignore_eos=True,
        skip_special_tokens=True,
        seed=2**64 - 1,
    )
    asked = GenerateRequest("r", (5, 6, 7), sampling, num_generated=2, return_routed_experts=True)
    body = wire.generate_body(asked, "r~1~", (1,))
    body["input_ids"] = list(body["input_ids"])
    assert problems_of_generate(body) == []
    said = body["sampling_params"]
    assert said["min_new_tokens"] == 9 and said["top_k"] == -1
    assert said["stop_token_ids"] == [4] and said["sampling_seed"] == 2**63 - 1
    assert said["custom_params"] == {"num_generated": 2}
    score = wire.score_body(ScoreRequest("s", (5, 6, 7), start=2, top=3), "s~1~")
    score["input_ids"] = list(score["input_ids"])
    assert problems_of_generate(score) == []
    assert (score["logprob_start_len"], score["top_logprobs_num"]) == (1, 3)


def test_scores_of_other_tokens_are_refused() -> None:
    meta = {"weight_version": "0", "input_token_logprobs": [[None, 5, None], [-1.0, 9, None]]}
    with pytest.raises(wire.MalformedAnswerError, match="other tokens"):
        wire.score_result(ScoreRequest("s", (5, 6)), {"meta_info": meta})


def settings(**changes: Any) -> LaunchSettings:
    return LaunchSettings(Path("/m"), 30000, 512, sys.executable, **changes)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "require_module", lambda *names: None)


def test_the_users_settings_stand_after_the_runs_own(installed: None) -> None:
    users = {"mem_fraction_static": "0.8", "tp_size": 2, "enable_metrics": "true"}
    users |= {"dtype": "float32", "cuda_graph_bs": [1, 2], "json_model_override_args": {"a": 1}}
    users |= {"disable_radix_cache": False}
    spec = launching.launch(settings(device="cuda", sleeps=True, passthrough=users))
    assert spec.argv[:3] == [sys.executable, "-m", "sglang.launch_server"]
    flags = spec.argv[3:]
    for wanted in (
        "--model-path=/m",
        "--port=30000",
        "--context-length=512",
        "--device=cuda",
        "--enable-memory-saver",
        "--skip-server-warmup",
        "--sampling-defaults=openai",
        "--mem-fraction-static=0.8",
        "--tp-size=2",
        "--enable-metrics",
        "--dtype=float32",
        '--json-model-override-args={"a":1}',
    ):
        assert wanted in flags, wanted
    at = flags.index("--cuda-graph-bs")
    assert flags[at : at + 3] == ["--cuda-graph-bs", "1", "2"]
    gone = ("--disable-radix-cache", "--trust-remote-code", "--max-running-requests")
    assert not any(flag.startswith(gone) for flag in flags)
    assert "--enable-return-routed-experts" not in flags
    assert spec.ready_path == "/health"


def test_a_setting_that_the_run_sets_is_refused_by_name(installed: None) -> None:
    for name in launching._RUNS_OWN:
        with pytest.raises(ConfigError, match=f"--sglang-{name.replace('_', '-')} is set by the"):
            launching.launch(settings(passthrough={name: "1"}))


def test_a_python_without_sglang_is_said() -> None:
    with pytest.raises(MissingExtraError, match=r"has no SGLang.*--engine-python"):
        launching.launch(settings())
    with pytest.raises(MissingExtraError, match="can't be run"):
        launching.launch(LaunchSettings(Path("/m"), 1, 512, "/no/such/python"))


def test_a_group_of_weights_is_joined_used_and_left() -> None:
    async def work() -> None:
        async with SglangServer(tiny_engine(), context_len=200) as server:
            http = HttpClient(server.url)
            groups = WeightGroups(http)
            tensors = [TensorFacts("a", "bfloat16", (2, 3)), TensorFacts("b", "float32", (4,))]
            with pytest.raises(EngineRefusedError, match="not initialized"):
                await groups.update(tensors, 4)
            await groups.init("127.0.0.1", 2900, rank_offset=1, world_size=2)
            await groups.update(tensors, 4)
            assert server.version == "4"
            await groups.destroy()
            with pytest.raises(EngineRefusedError, match="does not exist"):
                await groups.destroy()
            await http.close()
            assert server.violations == []
            (body, *_) = server.bodies("/update_weights_from_distributed")
            assert body["shapes"] == [[2, 3], [4]] and body["weight_version"] == "4"

    asyncio.run(work())


def test_the_server_of_the_tests_refuses_what_sglang_would() -> None:
    wrong: list[dict[str, Any]] = [
        {"input_ids": [1], "sampling_params": {"max_tokens": 3}},
        {"input_ids": [1], "sampling_params": {"temperature": -1}},
        {"input_ids": [1], "sampling_params": {"stop_token_ids": ["a"]}},
        {"input_ids": [1], "sampling_params": {"min_new_tokens": 5, "max_new_tokens": 4}},
        {"input_ids": [1], "return_logprobs": True},
        {"input_ids": ["1"]},
        {"text": "a", "input_ids": [1]},
        {},
    ]
    assert all(problems_of_generate(body) for body in wrong)
