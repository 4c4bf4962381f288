"""What functions around the rollout must keep: --eval-function-path, --custom-rm-path,
--dynamic-sampling-filter-path, --buffer-filter-path, --data-source-path,
--rollout-sample-filter-path and --rollout-all-samples-process-path. Of hooks that only some runs
have (Megatron's, the router's, ...) the call form is tested.

    python test_plugin_path_loading_contracts.py --custom-rm-path my_project.rewards.score

`--help` lists the flags; `contract_paths.py` says how else functions are named.
"""

import json
import math
import sys
from collections.abc import Mapping

import pytest
from contract_paths import run_as_script, targets
from contract_world import World, changed, frozen

from dovetail.hooks import HOOKS
from dovetail.types import DataSourceCall, DynamicFilterOutput, EvalOutput, Sample

SLOTS = (
    "eval_function",
    "custom_rm",
    "dynamic_sampling_filter",
    "buffer_filter",
    "data_source",
    "rollout_sample_filter",
    "rollout_all_samples_process",
)
OWNED = tuple(spec.slot for spec in HOOKS if spec.owner is not None)
FLAGS = (*SLOTS, *OWNED)
SAMPLES = {
    "eval_function": (
        "slime.rollout.sglang_rollout.generate_rollout",
        "slime_style.py:evaluate",
        "slime_style.py:generate_rollout",
        "miles_style.py:GuessingRollout",
        "native.py:evaluate",
    ),
    "custom_rm": (
        "slime_style.py:custom_rm",
        "slime_style.py:batched_custom_rm",
        "native.py:reward",
        "native.py:rewards",
    ),
    "dynamic_sampling_filter": (
        "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
        "slime_style.py:keep_mixed",
        "vime_style.py:filter_function",
        "native.py:keep",
    ),
    "buffer_filter": (
        "slime_style.py:newest_first",
        "vime_style.py:buffer_filter",
        "miles_style.py:buffer_filter",
        "native.py:longest_first",
    ),
    "data_source": (
        "slime.rollout.data_source.RolloutDataSourceWithBuffer",
        "slime_style.py:Prompts",
        "native.py:source",
    ),
    "rollout_sample_filter": (
        "slime_style.py:drop_truncated",
        "vime_style.py:remove_wrong",
        "native.py:remove_wrong",
    ),
    "rollout_all_samples_process": (
        "slime_style.py:count_all",
        "vime_style.py:process_all",
        "miles_style.py:process_all",
        "native.py:look_at_all",
    ),
    "custom_megatron_before_log_prob_hook": ("slime_style.py:before_log_prob",),
    "custom_model_provider": ("miles_style.py:model_provider",),
    "custom_agent_function": ("miles_style.py:agent",),
    "router_middleware": ("slime_style.py:Middleware",),
}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def each(slot):
    return pytest.mark.parametrize("path", targets(FLAGS, SAMPLES, slot))


PATHS = [(slot, path) for slot in FLAGS for path in targets(FLAGS, SAMPLES, slot)]


@pytest.mark.parametrize(("slot", "path"), PATHS)
def test_it_loads_and_its_parameters_fit_a_call_form(world, slot, path):
    hook = world.bound(slot, path)
    assert hook.form in hook.spec.forms
    print(f"{path} is called as {hook.form.label}: {hook.form.signature}")


@each("eval_function")
def test_an_evaluation_gives_sets_of_rewards_or_samples(world, path):
    output = world.call(world.bound("eval_function", path), world.rollout_call(0, evaluation=True))
    assert isinstance(output, EvalOutput)
    assert isinstance(output.data, Mapping) and output.data, "no evaluation set"
    for name, samples in output.data.items():
        assert isinstance(name, str)
        assert all(isinstance(sample, Sample) for sample in samples), name
        assert samples or f"eval/{name}/reward" in output.metrics, f"{name} has nothing in it"
    odd = {k: v for k, v in output.metrics.items() if not isinstance(v, int | float)}
    assert not odd, f"metrics that are no numbers: {odd}"


@each("eval_function")
def test_an_evaluation_leaves_the_training_prompts_in_order(world, path):
    hook = world.bound("eval_function", path)
    first = hook.form.positional
    world.call(hook, world.rollout_call(0, evaluation=True))
    given = [group[0].group_index for group in world.source.get_samples(2)]
    assert given == sorted(set(given)), f"{path} ({first}) disturbed the data source: {given}"


def reward_of(value, world):
    """The number in what a reward function gave."""
    key = world.config.reward.reward_key
    number = value[key] if key and isinstance(value, Mapping) else value
    assert not isinstance(number, Mapping), (
        f"a reward with the entries {sorted(number)}: the run needs --reward-key; "
        "add --run-flags '--reward-key NAME'"
    )
    return float(number)


def rewards_of(world, path, group):
    hook = world.bound("custom_rm", path)
    if hook.form.batched:
        rewards = world.call(hook, group)
        assert isinstance(rewards, list)
        assert len(rewards) == len(group), f"{len(rewards)} rewards for {len(group)} samples"
        return rewards
    if world.args.group_rm:
        return world.call(hook, group)
    return [world.call(hook, sample) for sample in group]


@each("custom_rm")
def test_a_reward_is_a_finite_number_for_each_sample(world, path):
    for group in world.finished_groups(2):
        for value in rewards_of(world, path, group):
            assert math.isfinite(reward_of(value, world)), value


@each("custom_rm")
def test_a_reward_function_changes_nothing_but_reward_and_metadata(world, path):
    (group,) = world.finished_groups(1)
    before = frozen([group])
    rewards_of(world, path, group)
    assert changed(before, [group]) <= {"reward", "metadata", "non_generation_time", "trace"}


@each("custom_rm")
def test_a_reward_function_judges_empty_and_truncated_responses_too(world, path):
    (group,) = world.finished_groups(1)
    group[0].response = ""
    group[1].status = Sample.Status.TRUNCATED
    for value in rewards_of(world, path, group):
        assert math.isfinite(reward_of(value, world))


@each("dynamic_sampling_filter")
def test_a_dynamic_filter_gives_a_verdict_and_leaves_the_group_alone(world, path):
    hook = world.bound("dynamic_sampling_filter", path)
    for group in world.finished_groups(3):
        before = frozen([group])
        verdict = world.call(hook, group)
        assert isinstance(verdict, DynamicFilterOutput)
        assert isinstance(verdict.keep, bool)
        assert verdict.reason is None or isinstance(verdict.reason, str)
        assert changed(before, [group]) <= {"metadata"}


@each("dynamic_sampling_filter")
def test_a_dynamic_filter_judges_equal_rewards_and_keeps_a_group_now_and_then(world, path):
    hook = world.bound("dynamic_sampling_filter", path)
    mixed, equal = world.finished_groups(2)
    for sample in equal:
        sample.reward = mixed[0].reward
    verdicts = [world.call(hook, group).keep for group in (mixed, equal)]
    assert any(verdicts), "it dropped a group of mixed and one of equal rewards: no step fills up"


@pytest.mark.parametrize("wanted", [1, 2, 10])
@each("buffer_filter")
def test_a_buffer_filter_takes_groups_out_of_the_buffer(world, path, wanted):
    hook = world.bound("buffer_filter", path)
    buffer = world.finished_groups(4)
    everything = {id(group): group for group in buffer}
    before = frozen(list(everything.values()))
    taken = world.call(hook, buffer, wanted)
    assert len(taken) <= wanted, f"{len(taken)} groups where {wanted} were asked for"
    assert all(id(group) in everything for group in taken), "groups that were not in the buffer"
    left = {id(group) for group in buffer}
    assert not left & {id(group) for group in taken}, (
        "groups that it gave back are still in the buffer; they would be served again"
    )
    assert changed(before, list(everything.values())) <= {"metadata"}


def made_source(world, path):
    hook = world.bound("data_source", path)
    call = DataSourceCall(world.args, world.make_source, world.tokenizer, world.config.data)
    return world.call(hook, call)


@each("data_source")
def test_a_data_source_gives_groups_of_numbered_siblings(world, path):
    source = made_source(world, path)
    size = world.config.rollout.n_samples_per_prompt
    groups = [*source.get_samples(3), *source.get_samples(2)]
    assert [len(group) for group in groups] == [size] * 5, "groups of another size"
    for group in groups:
        assert len({sample.group_index for sample in group}) == 1, "siblings of several groups"
        assert all(isinstance(sample, Sample) for sample in group)
        assert all(sample.prompt or sample.tokens for sample in group), "a sample without prompt"
        assert all(sample.response_length == 0 for sample in group), "a sample with a response"
    indices = [sample.index for group in groups for sample in group]
    numbered = [index for index in indices if index is not None]
    assert len(set(numbered)) == len(numbered), f"indices repeat: {numbered}"


@each("data_source")
def test_a_data_source_serves_what_came_back(world, path):
    source = made_source(world, path)
    returned = source.get_samples(2)
    for sample in (sample for group in returned for sample in group):
        sample.status = Sample.Status.ABORTED
    source.add_samples(returned)
    source.add_samples([])
    served = [group[0].group_index for group in source.get_samples(4)]
    assert len(served) == 4
    lost = {group[0].group_index for group in returned} - set(served)
    assert not lost, f"groups {lost} were put back and not served again"


@each("data_source")
def test_a_data_source_goes_on_where_it_was_saved(world, path, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    world.args.save = world.args.load = str(saved)
    source = made_source(world, path)
    source.get_samples(2)
    source.save(1)
    state = json.loads(json.dumps(source.state_dict()))
    expected = [[sample.prompt for sample in group] for group in source.get_samples(3)]
    if state == {"foreign": True} and not any(saved.iterdir()):
        pytest.skip("keeps files elsewhere, or nothing: its save was called")
    other = made_source(world, path)
    if state == {"foreign": True}:
        other.load(1)
    else:
        other.load_state_dict(state)
    assert [[sample.prompt for sample in group] for group in other.get_samples(3)] == expected


@each("rollout_sample_filter")
def test_a_sample_filter_only_marks_samples(world, path):
    groups = world.finished_groups(3)
    before, shape = frozen(groups), [list(map(id, group)) for group in groups]
    world.call(world.bound("rollout_sample_filter", path), groups)
    assert [list(map(id, group)) for group in groups] == shape, "it took samples out of the list"
    assert changed(before, groups) <= {"remove_sample", "metadata", "loss_mask"}
    assert all(isinstance(s.remove_sample, bool) for group in groups for s in group)


@each("rollout_all_samples_process")
def test_an_all_samples_process_takes_groups_of_every_fate(world, path):
    groups = world.finished_groups(3)
    for sample in groups[0]:
        sample.remove_sample = True
    for sample in groups[1]:
        sample.reward = groups[1][0].reward
    shape = [len(group) for group in groups]
    world.call(world.bound("rollout_all_samples_process", path), groups, world.source)
    assert [len(group) for group in groups] == shape, "it changed the list of groups"
    again = [group[0].group_index for group in world.source.get_samples(2)]
    assert len(again) == 2, "the data source has nothing left to give"


if __name__ == "__main__":
    sys.exit(run_as_script(__file__, FLAGS))
