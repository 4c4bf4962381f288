"""What the comparison with a peer writes, from steps made up by hand."""

import json

import pytest

from benchmarks.compare import quick_shape
from benchmarks.report import OWN, PEER, Ratio, Step, ratios, result, text
from benchmarks.shapes import SHAPES, SHORT_RESPONSE_MEAN, Job, prompts_of, reward_of

FACTS = {"loss": 0.0, "grad_norm": 1.0, "entropy": 2.0, "reward": 0.5}


def step(
    side, precision="default", turn=0, step_s=1.0, rollout_s=0.5, lens=(10, 10), shape="short"
):
    return Step(shape, side, precision, turn, step_s, rollout_s, lens, FACTS, step_s, rollout_s)


def test_ratios_compare_steps_of_the_same_turn_and_take_the_median():
    steps = [
        step(OWN, turn=0, step_s=1.0, rollout_s=0.5),
        step(PEER, turn=0, step_s=2.0, rollout_s=1.0),
        step(OWN, turn=1, step_s=2.0, rollout_s=1.0),
        step(PEER, turn=1, step_s=6.0, rollout_s=5.0),
        step(OWN, turn=2, step_s=1.0, rollout_s=0.5),
        step(PEER, turn=2, step_s=4.0, rollout_s=2.0),
        step(PEER, turn=3, step_s=99.0, rollout_s=99.0),
    ]
    found = ratios(steps, "short", ("default", "default"))
    assert found["rollout_ratio"] == found["rollout_cpu_ratio"] == Ratio(4.0, 2.0, 5.0)
    assert found["step_ratio"] == found["step_cpu_ratio"] == Ratio(3.0, 2.0, 4.0)


def test_rollout_speed_counts_tokens_so_that_unequal_lengths_do_not_help():
    steps = [step(OWN, rollout_s=1.0, lens=(5, 5)), step(PEER, rollout_s=2.0, lens=(10, 10))]
    found = ratios(steps, "short", ("default", "default"))
    assert found["rollout_ratio"].median == pytest.approx(1.0)
    assert found["rollout_cpu_ratio"].median == pytest.approx(1.0)


def test_a_pair_that_was_not_measured_has_no_ratio():
    assert ratios([step(OWN)], "short", ("default", "default")) == {}


def test_the_document_has_every_ratio_by_shape_and_can_be_written():
    shapes = [shape.name for shape in SHAPES]
    steps = [
        step(side, precision, shape=shape, step_s=2.0 if side == PEER else 1.0)
        for shape in shapes
        for side in (OWN, PEER)
        for precision in ("default", "float32")
    ]
    peaks = {("short", OWN, "default"): 500.0, ("short", PEER, "default"): 1500.0}
    document = json.loads(json.dumps(result(steps, shapes, peaks, {"quick": True})))
    for key in ("rollout_ratio", "step_ratio", "rollout_ratio_same_dtype", "step_ratio_same_dtype"):
        assert list(document[key]) == shapes
    assert document["step_ratio"]["long_tail"] == 2.0
    assert document["ranges"]["step_ratio"]["short"] == [2.0, 2.0]
    assert document["peak_memory_ratio"] == {"short": 3.0}
    assert "rollout_ratio_bfloat16" not in document
    side = document["sides"]["short"]["trl default"]
    assert side["response_tokens_per_step"] == [20]
    assert side["last"]["grad_norm"] == 1.0
    assert document["quick"] is True
    assert "3.00x" in text(document)


def test_trl_in_bfloat16_is_compared_with_our_default():
    document = result([step(OWN), step(PEER, "bfloat16", step_s=3.0)], ["short"], {}, {})
    assert document["step_ratio_bfloat16"] == {"short": 3.0}


def test_every_step_of_a_shape_has_its_prompts_and_its_long_ones_last():
    long_tail = next(shape for shape in SHAPES if shape.long_prompts)
    prompts = prompts_of(long_tail, steps=2, seed=1)
    assert len(prompts) == 2 * long_tail.prompts
    assert {len(prompt.split()) for prompt in prompts} == {long_tail.prompt_len}
    last_ids = [int(prompt.split()[-1].removeprefix("w")) for prompt in prompts]
    assert [token_id >= 7680 for token_id in last_ids] == [False] * 7 + [True] + [False] * 7 + [
        True
    ]
    assert prompts == prompts_of(long_tail, steps=2, seed=1)


def test_long_tail_means_a_limit_of_six_times_the_mean_length():
    long_tail = next(shape for shape in SHAPES if shape.long_prompts)
    share = long_tail.long_prompts / long_tail.prompts
    mean = share * long_tail.response_limit + (1 - share) * SHORT_RESPONSE_MEAN
    assert mean == pytest.approx(long_tail.response_limit / 6, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_quick_keeps_lengths_but_the_longest_and_the_share_of_long_responses(shape):
    quick = quick_shape(shape)
    assert quick.sequences in (16, 32)
    assert quick.prompt_len == shape.prompt_len
    limits = {"short": 64, "long_tail": 256, "shared_prompt": 64}
    assert quick.response_limit == limits[shape.name]
    assert quick.long_prompts / quick.prompts == shape.long_prompts / shape.prompts


def test_a_job_survives_the_way_to_a_worker():
    job = Job(SHAPES[1], "float32", 4, "/somewhere")
    assert Job.from_json(job.to_json()) == job


def test_the_reward_is_the_share_of_even_tokens():
    assert reward_of([2, 3, 4, 6]) == 0.75
    assert reward_of([]) == 0.0
