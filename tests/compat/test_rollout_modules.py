"""The default rollout under its foreign addresses, against a server, with a bare class as args."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dovetail.compat.modules import rollout as sglang_rollout
from dovetail.compat.modules.misc import SingletonMeta
from dovetail.types import DynamicFilterOutput, HookRunError, RolloutError, Sample
from tests.compat.engine_server import LOGPROBS, TOKENS, EngineServer, serving

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": -1, "max_new_tokens": 8}


class Characters:
    """A tokenizer of one id per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(one) for one in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefgh"[one % 8] for one in ids)


def bare_args(server: EngineServer | None = None, **values: Any) -> Any:
    """What a contract test has for args: a class with class attributes and nothing more."""
    names = {
        "partial_rollout": False,
        "mask_offpolicy_in_partial_rollout": False,
        "group_rm": False,
        "custom_generate_function_path": None,
        "sglang_enable_deterministic_inference": False,
        "rollout_seed": 42,
        "n_samples_per_prompt": 2,
        "custom_rm_path": f"{__name__}.length_reward",
        "reward_key": None,
        **values,
    }
    if server is not None:
        names |= {"sglang_router_ip": server.address[0], "sglang_router_port": server.address[1]}
    return type("Args", (), names)


async def length_reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    return float(sample.response_length)


async def list_reward(args: Any, samples: list[Sample], **kwargs: Any) -> list[float]:
    return [10.0 + i for i in range(len(samples))]


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        "dovetail.compat.modules.state.load_tokenizer", lambda *_, **__: Characters()
    )
    monkeypatch.setattr("dovetail.compat.modules.state.load_processor", lambda *_, **__: None)
    SingletonMeta.clear_all_instances()
    yield
    SingletonMeta.clear_all_instances()


def groups_from(start: int = 0) -> Any:
    """A data source: `get(n)` gives n groups of two prompts."""
    given: list[int] = []

    def get(count: int) -> list[list[Sample]]:
        first = start + len(given)
        given.extend(range(count))
        return [
            [Sample(group_index=g, index=2 * g + i, prompt="1+1=", label="2") for i in range(2)]
            for g in range(first, first + count)
        ]

    return get


def test_generate_asks_the_server_and_appends_what_it_answers() -> None:
    async def play() -> None:
        async with serving() as server:
            args = bare_args(server, hf_checkpoint="m")
            sample = await sglang_rollout.generate(args, Sample(prompt="ab"), dict(SAMPLING))
            (body,) = server.bodies("/generate")
            assert body["input_ids"] == [97, 98] and body["return_logprob"] is True
            assert body["sampling_params"]["max_new_tokens"] == 8
            assert sample.tokens == [97, 98, *TOKENS]
            assert sample.rollout_log_probs == LOGPROBS and sample.loss_mask == [1, 1, 1]
            assert (sample.response, sample.response_length) == ("abc", 3)
            assert sample.status is Sample.Status.COMPLETED and sample.weight_versions == ["3"]

    asyncio.run(play())


def test_generate_goes_on_with_what_is_there_within_the_whole_limit() -> None:
    async def play() -> None:
        async with serving() as server:
            args = bare_args(server, hf_checkpoint="m")
            sample = Sample(prompt="a", tokens=[97], status=Sample.Status.ABORTED)
            sample.append_response_tokens(tokens=[1, 2], log_probs=[-1.0, -2.0], text="x")
            await sglang_rollout.generate(args, sample, dict(SAMPLING))
            (body,) = server.bodies("/generate")
            assert body["input_ids"] == [97, 1, 2]
            assert body["sampling_params"]["max_new_tokens"] == 6
            assert sample.tokens == [97, 1, 2, *TOKENS] and sample.response == "xabc"
            full = Sample(prompt="a", tokens=[97], status=Sample.Status.ABORTED)
            full.append_response_tokens(tokens=[1] * 8, log_probs=[-1.0] * 8)
            await sglang_rollout.generate(args, full, dict(SAMPLING))
            assert full.status is Sample.Status.TRUNCATED and len(server.asked) == 1

    asyncio.run(play())


def test_a_vllm_server_is_asked_in_its_own_form() -> None:
    async def play() -> None:
        async with serving() as server:
            host, port = server.address
            args = bare_args(vllm_router_ip=host, vllm_router_port=port, hf_checkpoint="m")
            wanted = {**SAMPLING, "stop": ["\n"], "no_stop_trim": True, "seed": 3}
            sample = await sglang_rollout.generate(args, Sample(prompt="ab"), wanted)
            (body,) = server.bodies("/inference/v1/generate")
            assert body["model"] == "m" and body["token_ids"] == [97, 98]
            assert body["sampling_params"] == {
                "max_tokens": 8,
                "temperature": 1.0,
                "top_p": 0.9,
                "top_k": -1,
                "logprobs": 1,
                "stop": ["\n"],
                "include_stop_str_in_output": True,
                "seed": 3,
            }
            assert sample.tokens == [97, 98, *TOKENS] and sample.rollout_log_probs == LOGPROBS
            assert sample.status is Sample.Status.TRUNCATED and sample.response == "fgh"

    asyncio.run(play())


def test_args_without_an_address_say_so() -> None:
    with pytest.raises(HookRunError, match="sglang_router_ip"):
        asyncio.run(sglang_rollout.generate(bare_args(), Sample(tokens=[1]), dict(SAMPLING)))


def module_with(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> str:
    """A plugin's module with these functions; its name."""
    import sys

    module = ModuleType("their_plugin")
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, "their_plugin", module)
    return "their_plugin"


def answered(sample: Sample, reward: float | None = None) -> Sample:
    sample.append_response_tokens(tokens=[9], log_probs=[-0.5], text="z")
    sample.status, sample.reward = Sample.Status.COMPLETED, reward
    return sample


def test_generate_and_rm_calls_the_samples_own_function_before_the_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    async def run_s(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        seen.append(("run", None))
        return answered(sample)

    async def own(args: Any, sample: Sample, sampling_params: Any, evaluation: bool = False) -> Any:
        seen.append(("own", evaluation))
        return answered(sample, 7.0)

    name = module_with(monkeypatch, run_s=run_s, own=own, length_reward=length_reward)
    args = bare_args(
        custom_generate_function_path=f"{name}.run_s", custom_rm_path=f"{name}.length_reward"
    )
    first = asyncio.run(sglang_rollout.generate_and_rm(args, Sample(index=0), dict(SAMPLING)))
    second = Sample(index=1, generate_function_path=f"{name}.own")
    second = asyncio.run(sglang_rollout.generate_and_rm(args, second, dict(SAMPLING), True))
    assert seen == [("run", None), ("own", True)]
    assert (first.reward, second.reward) == (1.0, 7.0)


@pytest.mark.parametrize("form", ["function", "class"])
def test_generate_functions_of_one_record_work_too(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    from dovetail.types.family import GenerateFnInput, GenerateFnOutput

    async def new_style(input: GenerateFnInput) -> GenerateFnOutput:
        assert input.args.group_rm is False and input.sampling_params["max_new_tokens"] == 8
        return GenerateFnOutput(answered(input.sample, 1.5))

    class NewStyle:
        async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
            return await new_style(input)

    name = module_with(monkeypatch, target=new_style if form == "function" else NewStyle)
    args = bare_args(custom_generate_function_path=f"{name}.target")
    made = asyncio.run(sglang_rollout.generate_and_rm(args, Sample(index=0), dict(SAMPLING)))
    assert made.reward == 1.5 and made.response == "z"


def test_a_generate_function_that_gives_back_something_else_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def forgot(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> None:
        answered(sample)

    name = module_with(monkeypatch, forgot=forgot)
    args = bare_args(custom_generate_function_path=f"{name}.forgot")
    with pytest.raises(HookRunError, match=r"forgot gave back NoneType for sample 4"):
        asyncio.run(sglang_rollout.generate_and_rm(args, Sample(index=4), dict(SAMPLING)))


def test_a_fan_out_is_rewarded_as_a_list_and_only_where_a_reward_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fan_out(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
        return [answered(Sample(index=0), 5.0), answered(Sample(index=0))]

    name = module_with(monkeypatch, fan_out=fan_out, length_reward=length_reward)
    args = bare_args(
        custom_generate_function_path=f"{name}.fan_out", custom_rm_path=f"{name}.length_reward"
    )
    made = asyncio.run(sglang_rollout.generate_and_rm(args, Sample(index=0), dict(SAMPLING)))
    assert [one.reward for one in made] == [5.0, 1.0]


def test_a_group_reward_sees_all_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        return answered(sample)

    name = module_with(monkeypatch, one=one, list_reward=list_reward)
    args = bare_args(
        group_rm=True,
        custom_generate_function_path=f"{name}.one",
        custom_rm_path=f"{name}.list_reward",
    )
    group = [Sample(index=0), Sample(index=1)]
    made = asyncio.run(sglang_rollout.generate_and_rm_group(args, group, dict(SAMPLING)))
    assert [sample.reward for sample in made] == [10.0, 11.0]
    assert len({sample.session_id for sample in made}) == 2


def test_patched_globals_are_what_the_functions_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fake(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        return answered(sample)

    async def reward(args: Any, sample: Sample) -> float:
        return 0.25

    monkeypatch.setattr(sglang_rollout, "generate", fake)
    monkeypatch.setattr(sglang_rollout, "async_rm", reward)
    made = asyncio.run(sglang_rollout.generate_and_rm(bare_args(), Sample(index=0), dict(SAMPLING)))
    assert made.reward == 0.25


def test_an_aborted_state_gives_samples_back_aborted() -> None:
    args = bare_args()
    sglang_rollout.GenerateState(args).aborted = True
    made = asyncio.run(sglang_rollout.generate_and_rm(args, Sample(index=0), dict(SAMPLING)))
    assert made.status is Sample.Status.ABORTED and made.reward is None


def test_the_state_is_one_and_has_what_plugins_use() -> None:
    args = bare_args(rollout_temperature=0.5)
    state = sglang_rollout.GenerateState(args)
    assert sglang_rollout.GenerateState(bare_args()) is state and state.args is args
    assert state.sampling_params["temperature"] == 0.5 and state.group_sampling_seeds == [42, 43]
    with state.dp_rank_context() as rank:
        assert state.dp_counts[rank] == 1
    assert state.dp_counts == [0] and state.pendings == set()


def odd(args: Any, group: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    index = group[0].group_index or 0
    return DynamicFilterOutput(keep=index % 2 == 1, reason=None if index % 2 else "even")


def test_a_rollout_fills_the_step_filters_it_and_counts_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def remove_second(args: Any, groups: list[list[Sample]]) -> None:
        for group in groups:
            group[1].remove_sample = True

    def watch(args: Any, all_samples: list[Any], data_source: Any) -> None:
        seen["all"] = [group[0].group_index for group in all_samples]

    name = module_with(
        monkeypatch, remove_second=remove_second, watch=watch, odd=odd, rm=length_reward
    )

    async def play() -> None:
        async with serving() as server:
            args = bare_args(
                server,
                rollout_batch_size=2,
                over_sampling_batch_size=2,
                dynamic_sampling_filter_path=f"{name}.odd",
                rollout_sample_filter_path=f"{name}.remove_second",
                rollout_all_samples_process_path=f"{name}.watch",
                custom_rm_path=f"{name}.rm",
                hf_checkpoint="m",
            )
            output, aborted = await sglang_rollout.generate_rollout_async(args, 0, groups_from())
            assert [group[0].group_index for group in output.samples] == [1, 3]
            assert output.metrics == {"rollout/dynamic_filter/drop_even": 2}
            assert [s.remove_sample for s in output.samples[0]] == [False, True]
            assert seen["all"] == [0, 1, 2, 3] and aborted == []
            assert not sglang_rollout.GenerateState(args).aborted

    asyncio.run(play())


def test_with_partial_rollout_what_is_under_way_comes_back_with_its_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = module_with(monkeypatch, rm=length_reward)

    async def play() -> None:
        async with serving() as server:
            server.hold = 2
            args = bare_args(
                server,
                rollout_batch_size=1,
                over_sampling_batch_size=2,
                partial_rollout=True,
                custom_rm_path=f"{name}.rm",
                hf_checkpoint="m",
            )
            output, aborted = await sglang_rollout.generate_rollout_async(args, 4, groups_from())
            assert len(output.samples) == 1 and len(aborted) == 1
            assert server.bodies("/abort_request") == [{"abort_all": True}]
            for sample in aborted[0]:
                assert sample.status is Sample.Status.ABORTED and sample.response_length == 1
                assert sample.metadata["start_rollout_id"] == 4 and sample.reward is None

    asyncio.run(play())


def test_a_generate_function_that_always_raises_ends_the_rollout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        raise KeyError("tool")

    name = module_with(monkeypatch, broken=broken)

    async def play() -> None:
        async with serving() as server:
            args = bare_args(
                server,
                rollout_batch_size=2,
                max_failed_groups=3,
                custom_generate_function_path=f"{name}.broken",
            )
            with pytest.raises(RolloutError, match="3 groups in a row failed"):
                await sglang_rollout.generate_rollout_async(args, 0, groups_from())

    asyncio.run(play())


def test_evaluation_answers_every_prompt_of_every_set_in_order(tmp_path: Path) -> None:
    data = tmp_path / "held.jsonl"
    data.write_text('{"input": "1+1=", "label": "2"}\n{"input": "2+2=", "label": "4"}\n')
    dataset = type(
        "Dataset",
        (),
        {
            "name": "sums",
            "path": str(data),
            "n_samples_per_eval_prompt": 2,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "max_response_len": 5,
            "input_key": "input",
            "label_key": "label",
            "custom_rm_path": None,
            "rm_type": None,
            "metadata": {"set": "sums"},
        },
    )

    async def play() -> None:
        async with serving() as server:
            args = bare_args(server, eval_datasets=[dataset], hf_checkpoint="m")
            args.custom_rm_path = None
            args.rm_type = "math"
            output, rest = await sglang_rollout.eval_rollout(args, 0)
            (result,) = output.data.values()
            assert list(output.data) == ["sums"] and rest == []
            assert [one.index for one in result["samples"]] == [0, 1, 2, 3]
            assert [one.label for one in result["samples"]] == ["2", "2", "4", "4"]
            assert result["rewards"] == [0.0] * 4 and result["truncated"] == [False] * 4
            wanted = {body["sampling_params"]["temperature"] for body in server.bodies("/generate")}
            assert wanted == {0.0}

    asyncio.run(play())
