"""Evaluation over named sets."""

import asyncio
import copy
import itertools

import pytest

from dovetail.rollout.evaluate import EvalSet, Evaluation, pass_at_k, pass_metrics
from dovetail.rollout.sampling import mix_seed
from dovetail.types import EngineError, RolloutError, Sample, SamplingParams
from tests.unit.rollout.fakes import FakeEngine, FakeScorer, FakeTokenizer


def prototypes(count, **fields):
    return [
        Sample(prompt=f"{i}?", tokens=[48 + i, 63], label=str(i), **fields) for i in range(count)
    ]


def run(sets, engine=None, scorer=None, **kwargs):
    return asyncio.run(
        Evaluation(
            engine or FakeEngine(), FakeTokenizer(), sets, scorer or FakeScorer(), seed=3, **kwargs
        )()
    )


def test_each_set_has_its_own_sampling_and_metrics_and_prototypes_stay_untouched():
    engine, prompts = FakeEngine(length=lambda seed: 6), prototypes(2, metadata={"a": []})
    before = copy.deepcopy(prompts)
    sets = [
        EvalSet("easy", prompts, sampling=SamplingParams(max_new_tokens=4)),
        EvalSet("hard", prompts, n_samples=2, sampling=SamplingParams(max_new_tokens=9)),
    ]
    output = run(sets, engine)
    assert prompts == before
    assert [len(output.data[name]) for name in ("easy", "hard")] == [2, 4]
    assert output.metrics["eval/easy/response_length"] == 4.0
    assert output.metrics["eval/easy/truncated"] == 1.0
    assert output.metrics["eval/hard/response_length"] == 6.0
    assert output.metrics["eval/hard/truncated"] == 0.0
    assert output.metrics["eval/hard/reward"] == 0.5
    assert output.metrics["eval/hard/pass@1"] == 0.5 and output.metrics["eval/hard/pass@2"] == 1.0
    assert "eval/easy/pass@1" not in output.metrics


def test_data_is_in_dataset_order_and_the_same_every_time():
    sets = [EvalSet("s", prototypes(5), n_samples=3)]
    first, second = run(sets), run(sets)
    assert [s.index for s in first.data["s"]] == list(range(15))
    assert [s.tokens for s in first.data["s"]] == [s.tokens for s in second.data["s"]]
    assert len({tuple(s.tokens[2:]) for s in first.data["s"]}) > 5


def test_sets_override_reward_and_metadata():
    seen = []

    def rule(sample):
        seen.append((sample.metadata, sample.custom_rm_path))
        return {"acc": 1.0, "style": 0.25}

    one = EvalSet(
        "s",
        prototypes(1, metadata={"kept": 1}),
        reward_key="style",
        rm_type="math",
        custom_rm_path="m.f",
        metadata={"source": "x"},
    )
    assert run([one], scorer=FakeScorer(rule)).metrics["eval/s/reward"] == 0.25
    assert seen == [({"kept": 1, "source": "x", "rm_type": "math"}, "m.f")]


def test_group_rewards_see_the_samples_of_one_prompt():
    scorer = FakeScorer()
    run([EvalSet("s", prototypes(2), n_samples=2)], scorer=scorer, group_rm=True)
    assert sorted(scorer.groups) == [[0, 1], [2, 3]]


def test_a_failing_prompt_counts_as_wrong_and_a_failing_set_ends_the_run():
    async def generate(call):
        assert call.evaluation
        if call.sample.group_index == 0:
            raise OSError("tool down")
        return await call.default(call.sample, call.sampling)

    scorer = FakeScorer(lambda sample: 1.0)
    output = run([EvalSet("s", prototypes(4))], scorer=scorer, generate=generate)
    assert output.metrics["eval/s/reward"] == 0.75 and output.metrics["eval/s/failed"] == 1.0
    assert output.data["s"][0].status is Sample.Status.FAILED
    with pytest.raises(RolloutError, match=r"every sample of the evaluation set s.*tool down"):
        run([EvalSet("s", prototypes(1))], scorer=scorer, generate=generate)


def test_engine_errors_end_the_evaluation():
    class Broken(FakeEngine):
        async def generate(self, request):
            raise EngineError("device lost")

    with pytest.raises(EngineError, match="device lost"):
        run([EvalSet("s", prototypes(3))], Broken())


def test_progress_counts_prompts_of_all_sets():
    events = []
    run(
        [EvalSet("a", prototypes(2)), EvalSet("b", prototypes(1))],
        on_progress=lambda *event: events.append(event),
    )
    assert [event[:2] for event in events] == [(1, 3), (2, 3), (3, 3)] and events[-1][2] == 12


def test_pass_at_k_equals_counting_all_subsets():
    for n, c in itertools.product(range(1, 8), range(8)):
        if c > n:
            continue
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_refuses_impossible_counts():
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError, match=f"pass@{k} of 4"):
            pass_at_k(n, c, k)


def test_pass_metrics_take_powers_of_two_and_the_group_size():
    assert list(pass_metrics([[1.0] * 6, [0.0] * 6])) == ["pass@1", "pass@2", "pass@4", "pass@6"]
    assert pass_metrics([[1.0, 0.0], [0.0, 0.0]])["pass@1"] == 0.25


def test_seeds_are_stable_over_machines_and_do_not_collide():
    assert (mix_seed(42, 0), mix_seed(42, "set", 1)) == (
        2531500923445043698,
        7296869366301333335,
    )
    assert len({mix_seed(42, "set", i) for i in range(1000)}) == 1000


def test_a_set_may_have_its_own_generate_function_and_the_sample_hook_sees_both_sets():
    used, hooked = [], []

    def resolve(path):
        async def own(call):
            used.append((path, call.evaluation, call.sample.prompt))
            return await call.default(call.sample, call.sampling)

        return own

    async def sample_hook(sample, rollout_id, evaluation):
        hooked.append((rollout_id, evaluation, sample.reward))

    sets = [
        EvalSet("own", prototypes(1), custom_generate_function_path="their.fn"),
        EvalSet("plain", prototypes(1)),
    ]
    evaluation = Evaluation(
        FakeEngine(),
        FakeTokenizer(),
        sets,
        FakeScorer(),
        seed=3,
        resolve_generate=resolve,
        sample_hook=sample_hook,
    )
    output = asyncio.run(evaluation(4))
    assert used == [("their.fn", True, "0?")] and hooked == [(4, True, None)] * 2
    assert output.columns["own"] == {
        "rewards": [0.0],
        "truncated": [False],
        "samples": output.data["own"],
    }


def test_sampling_parameters_are_each_samples_own():
    given = []

    async def generate(call):
        params = call.sampling_params
        given.append(dict(params))
        params["max_new_tokens"] -= 100
        return await call.default(call.sample, call.sampling)

    one = EvalSet("s", prototypes(2), n_samples=2, sampling=SamplingParams(max_new_tokens=7))
    run([one], generate=generate)
    assert [params["max_new_tokens"] for params in given] == [7] * 4
    assert len({params["sampling_seed"] for params in given}) == 4
