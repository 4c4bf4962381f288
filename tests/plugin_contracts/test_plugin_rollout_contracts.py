"""What a function behind --rollout-function-path must keep.

    python test_plugin_rollout_contracts.py --rollout-function-path my_project.rollout.generate

`--help` lists the flags; `contract_paths.py` says how else functions are named.
"""

import sys
from numbers import Real

import pytest
from contract_paths import run_as_script, targets
from contract_world import World, check_answered

from dovetail.batch.convert import rows_from_samples
from dovetail.types import EvalOutput, RolloutOutput

SLOTS = ("rollout_function",)
SAMPLES = {
    "rollout_function": (
        "slime.rollout.sglang_rollout.generate_rollout",
        "vime.rollout.vllm_rollout.generate_rollout",
        "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn",
        "slime_style.py:generate_rollout",
        "miles_style.py:GuessingRollout",
        "miles_style.py:generate_rollout",
        "native.py:rollout",
    ),
}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def each(slot):
    return pytest.mark.parametrize("path", targets(SLOTS, SAMPLES, slot))


def collected(world, path, *rollout_ids):
    hook = world.bound("rollout_function", path)
    outputs = [world.call(hook, world.rollout_call(number)) for number in rollout_ids]
    return outputs if len(outputs) > 1 else outputs[0]


@each("rollout_function")
def test_its_parameters_fit_a_call_form(world, path):
    hook = world.bound("rollout_function", path)
    assert hook.form in hook.spec.forms
    print(f"{path} is called as {hook.form.label}: {hook.form.signature}")


@each("rollout_function")
def test_it_gives_groups_of_answered_and_scored_samples(world, path):
    output = collected(world, path, 0)
    assert isinstance(output, RolloutOutput)
    assert output.samples and all(output.samples), "no groups, or an empty one"
    for sample in (sample for group in output.samples for sample in group):
        check_answered(sample)
        assert sample.reward is not None, f"sample {sample.index} has no reward"


@each("rollout_function")
def test_siblings_share_a_group_index_and_samples_have_indices_of_their_own(world, path):
    output = collected(world, path, 0)
    groups = [{sample.group_index for sample in group} for group in output.samples]
    assert all(len(indices) == 1 and None not in indices for indices in groups), groups
    assert len(set().union(*groups)) == len(groups), "two groups have the same group_index"
    # Samples that one execution fanned out into share the index of what they came from.
    indices = [(s.index, s.rollout_id, id(s)) for group in output.samples for s in group]
    alone = [index for index, rollout_id, _ in indices if rollout_id is None]
    assert len(set(alone)) == len(alone), f"indices repeat: {sorted(alone, key=str)}"
    assert len({identity for _, _, identity in indices}) == len(indices), "a sample is there twice"


@each("rollout_function")
def test_its_metrics_are_numbers_by_name(world, path):
    metrics = collected(world, path, 0).metrics
    assert all(isinstance(name, str) for name in metrics)
    wrong = {name: value for name, value in metrics.items() if not isinstance(value, Real)}
    assert not wrong, f"not numbers: {wrong}"


@each("rollout_function")
def test_its_samples_can_be_trained_on(world, path):
    output = collected(world, path, 0)
    samples = [sample for group in output.samples for sample in group]
    rows = rows_from_samples(samples, reward_key=world.config.reward.reward_key)
    assert len(rows) == len(samples)
    assert sum(sum(row.loss_mask) for row in rows) > 0, "no token is trained on"


@each("rollout_function")
def test_a_second_step_gives_samples_of_its_own(world, path):
    first, second = collected(world, path, 0, 1)
    one, two = ({id(s) for group in out.samples for s in group} for out in (first, second))
    assert not one & two, "a step gave samples of the step before it"


@each("rollout_function")
def test_it_evaluates_when_its_form_says_whether_to(world, path):
    hook = world.bound("rollout_function", path)
    if "native" in hook.form.families:
        pytest.skip("evaluation has a flag of its own: --eval-function-path")
    output = world.call(world.bound("eval_function", path), world.rollout_call(0, evaluation=True))
    assert isinstance(output, EvalOutput)
    assert output.data, "no evaluation set"


if __name__ == "__main__":
    sys.exit(run_as_script(__file__, SLOTS))
