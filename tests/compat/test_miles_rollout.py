"""miles' rollout objects, fully asynchronous rollout, and evaluation of saved models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dovetail.compat.modules import (
    checkpoint_eval,
    fully_async,
    inference_rollout,
    prefill,
)
from dovetail.compat.modules.async_buffer import (
    DataBufferConstructorInput,
    DataBufferInput,
    DefaultDataBuffer,
)
from dovetail.compat.modules.base_types import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
)
from dovetail.types import HookRunError, RolloutError, Sample
from tests.compat.engine_server import serving
from tests.compat.test_rollout_modules import (
    answered,
    bare_args,
    fresh_state,
    length_reward,
    module_with,
)

__all__ = ["fresh_state"]


class Prompts:
    """A data source that counts up and remembers what came back."""

    def __init__(self) -> None:
        self.next_group = 0
        self.returned: list[list[Sample]] = []

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        groups = []
        for _ in range(num_samples):
            number, self.next_group = self.next_group, self.next_group + 1
            groups.append(
                [Sample(group_index=number, index=2 * number + i, prompt="1+1=") for i in range(2)]
            )
        return groups

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.returned += samples


def test_the_rollout_object_collects_a_step_from_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = module_with(monkeypatch, rm=length_reward)

    async def play() -> None:
        async with serving() as server:
            args = bare_args(
                server, rollout_batch_size=2, custom_rm_path=f"{name}.rm", hf_checkpoint="m"
            )
            made = inference_rollout.InferenceRolloutFn(RolloutFnConstructorInput(args, Prompts()))
            output = await made(RolloutFnTrainInput(rollout_id=0))
            assert [[s.reward for s in group] for group in output.samples] == [[3.0, 3.0]] * 2
            results = await made(RolloutFnEvalInput(rollout_id=0))
            assert isinstance(results, RolloutFnEvalOutput) and results.data == {}

    asyncio.run(play())


def test_its_state_is_no_singleton_and_counts_samples_that_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def one(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        return answered(sample, 1.0)

    name = module_with(monkeypatch, one=one)
    args = bare_args(custom_generate_function_path=f"{name}.one")
    state = inference_rollout.GenerateState(args)
    assert inference_rollout.GenerateState(args) is not state
    done = []

    async def play() -> Any:
        return await inference_rollout.generate_and_rm_group(
            state,
            [Sample(index=0), Sample(index=1)],
            {},
            sample_done_callback=lambda: done.append(1),
        )

    made = asyncio.run(play())
    assert [sample.reward for sample in made] == [1.0, 1.0] and len(done) == 2


def test_a_saved_model_is_evaluated_by_the_users_class() -> None:
    class Mine(checkpoint_eval.CheckpointEvalFn):
        async def evaluate_checkpoint(
            self, checkpoint_dir: str, input: RolloutFnEvalInput
        ) -> RolloutFnEvalOutput:
            return RolloutFnEvalOutput(data={checkpoint_dir: {"rewards": [1.0]}})

    made = Mine(RolloutFnConstructorInput(bare_args(), None))
    output = asyncio.run(made(RolloutFnEvalInput(rollout_id=1, hf_dir="d")))
    assert output.data == {"d": {"rewards": [1.0]}}
    with pytest.raises(HookRunError, match="--save-hf"):
        asyncio.run(made(RolloutFnEvalInput(rollout_id=1)))
    with pytest.raises(HookRunError, match="only evaluates"):
        asyncio.run(made(RolloutFnTrainInput(rollout_id=1)))


def test_retargeted_args_point_elsewhere_and_the_old_ones_stay() -> None:
    args = bare_args(sglang_router_ip="a", sglang_router_port=1)()
    other = checkpoint_eval.retarget_args(args, "b", 2, 8, 4)
    assert (other.sglang_router_ip, other.sglang_router_port) == ("b", 2)
    assert (other.rollout_num_gpus, other.rollout_num_gpus_per_engine) == (8, 4)
    assert args.sglang_router_ip == "a"


def test_responses_are_scored_anew_by_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    async def post(url: str, body: Any, headers: Any = None) -> Any:
        asked.append((url, body))
        return {"meta_info": {"input_token_logprobs": [[None, 2], [-0.5, 7], [-0.25, 8]]}}

    monkeypatch.setattr(prefill, "post", post)
    score = prefill.recompute_samples_rollout_logprobs_via_prefill
    sample = Sample(index=0, tokens=[1, 2, 7, 8], response_length=2, rollout_log_probs=[0.0, 0.0])
    off, on = bare_args(), bare_args(recompute_logprobs_via_prefill=True)
    asyncio.run(score(off, [sample], url="http://h/generate", sampling_params={}))
    assert not asked and sample.rollout_log_probs == [0.0, 0.0]
    asyncio.run(score(on, [sample], url="http://h/generate", sampling_params={"top_p": 1.0}))
    assert [url for url, _ in asked] == ["http://h/flush_cache", "http://h/generate"]
    assert asked[1][1]["logprob_start_len"] == 1 and asked[1][1]["input_ids"] == [1, 2, 7, 8]
    assert sample.rollout_log_probs == [-0.5, -0.25]
    sample.tokens[-1] = 9
    with pytest.raises(HookRunError, match=r"expected the 2 of its response \[7, 9\]"):
        asyncio.run(score(on, [sample], url="http://h/generate", sampling_params={}))


def async_args(monkeypatch: pytest.MonkeyPatch, generate: Any, **values: Any) -> Any:
    name = module_with(monkeypatch, generate=generate)
    return bare_args(
        rollout_batch_size=2, custom_generate_function_path=f"{name}.generate", **values
    )


def test_a_slow_group_does_not_hold_up_a_step_and_comes_in_a_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_go: list[asyncio.Event] = []

    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        if sample.group_index == 0:
            await let_go[0].wait()
        return answered(sample, 1.0)

    async def play() -> None:
        let_go.append(asyncio.Event())
        args = async_args(monkeypatch, generate)
        made = fully_async.FullyAsyncRolloutFn(RolloutFnConstructorInput(args, Prompts()))
        first = await made(RolloutFnTrainInput(rollout_id=0))
        assert [group[0].group_index for group in first.samples] == [1, 2]
        let_go[0].set()
        later = [
            group[0].group_index
            for step in (1, 2)
            for group in (await made(RolloutFnTrainInput(rollout_id=step))).samples
        ]
        assert 0 in later and len(set(later)) == 4

    asyncio.run(play())


def test_the_producer_stops_ahead_of_training_when_the_buffer_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        return answered(sample, 1.0)

    async def play() -> None:
        source = Prompts()
        args = async_args(monkeypatch, generate)
        made = fully_async.FullyAsyncRolloutFn(RolloutFnConstructorInput(args, source))
        await made(RolloutFnTrainInput(rollout_id=0))
        for _ in range(200):
            await asyncio.sleep(0)
        # A step's groups were taken; a step's wait in the buffer; at most a step's hang before it.
        assert source.next_group <= 6

    asyncio.run(play())


def test_stale_groups_are_made_again_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        answered(sample, 1.0)
        sample.weight_versions = ["1" if (sample.group_index or 0) < 2 else "5"]
        return sample

    async def play() -> None:
        source = Prompts()
        args = async_args(monkeypatch, generate, max_weight_staleness=2)
        made = fully_async.FullyAsyncRolloutFn(RolloutFnConstructorInput(args, source))
        output = await made(RolloutFnTrainInput(rollout_id=5))
        assert [group[0].group_index for group in output.samples] == [2, 3]
        assert sorted(group[0].group_index or 0 for group in source.returned) == [0, 1]
        assert source.returned[0][0].response_length == 0
        assert output.metrics is not None
        assert output.metrics["rollout/fully_async/recycled_groups"] == 2.0
        assert output.metrics["rollout/fully_async/max_staleness"] == 0.0

    asyncio.run(play())


def test_aborted_groups_go_back_with_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        answered(sample)
        if sample.group_index == 0:
            sample.status = Sample.Status.ABORTED
        else:
            sample.reward = 1.0
        return sample

    async def play() -> None:
        source = Prompts()
        args = async_args(monkeypatch, generate)
        made = fully_async.FullyAsyncRolloutFn(RolloutFnConstructorInput(args, source))
        output = await made(RolloutFnTrainInput(rollout_id=0))
        assert [group[0].group_index for group in output.samples] == [1, 2]
        assert [sample.response_length for sample in source.returned[0]] == [1, 1]

    asyncio.run(play())


def test_a_generate_function_that_always_raises_ends_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        raise KeyError("tool")

    async def play() -> None:
        args = async_args(monkeypatch, generate, max_failed_groups=4)
        made = fully_async.FullyAsyncRolloutFn(RolloutFnConstructorInput(args, Prompts()))
        with pytest.raises(RolloutError, match="4 groups in a row failed"):
            await made(RolloutFnTrainInput(rollout_id=0))

    asyncio.run(play())


def test_slimes_function_has_a_worker_that_lives_across_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        return answered(sample, 1.0)

    args, source = async_args(monkeypatch, generate), Prompts()
    try:
        seen = []
        for step in range(3):
            output = fully_async.generate_rollout_fully_async(args, step, source)
            seen += [group[0].group_index for group in output.samples]
        assert len(set(seen)) == 6
    finally:
        fully_async.stop_worker()
    worker = fully_async.AsyncRolloutWorker(args, source, concurrency=4)
    worker.start()
    try:
        groups: list[Any] = []
        while len(groups) < 2:
            groups += worker.get_completed_groups(limit=1)
        assert worker.running and worker.worker_thread.is_alive() and worker.queue_size() >= 0
    finally:
        worker.stop()
    assert not worker.running


def test_a_full_buffer_throws_out_the_stalest_and_gives_the_freshest_first() -> None:
    args = bare_args(
        rollout_batch_size=2, async_data_buffer_max_batches=1, async_data_buffer_order="lifo"
    )
    thrown: list[list[Sample]] = []

    async def play() -> None:
        buffer = DefaultDataBuffer(DataBufferConstructorInput(args, thrown.append))
        for version in ("4", "2", "3"):
            group = [Sample(weight_versions=[version])]
            await buffer.put(DataBufferInput(group, group))
        assert [sample.weight_versions for sample in thrown[0]] == [["2"]]
        assert [(await buffer.get()).group[0].weight_versions for _ in range(2)] == [["3"], ["4"]]
        assert buffer.get_metrics() == {"queue_size": 0.0, "evicted_groups": 1.0}

    asyncio.run(play())
