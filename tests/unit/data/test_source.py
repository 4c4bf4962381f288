import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.data.source import PromptDataSource
from dovetail.types.errors import CheckpointError, DataError, HookRunError
from dovetail.types.sample import Sample


def make(num_prompts=5, group_size=2, **options):
    prompts = [Sample(prompt=f"p{i}", tokens=[i], label=str(i)) for i in range(num_prompts)]
    return PromptDataSource(prompts, group_size, **options)


def prompts_of(groups):
    return [group[0].prompt for group in groups]


def reload(source, **options):
    state = json.loads(json.dumps(source.state_dict()))
    fresh = make(len(source), **options)
    fresh.load_state_dict(state)
    return fresh


def test_groups_are_siblings_with_indices_over_the_whole_run():
    source = make(3)
    groups = source.get_samples(2) + source.get_samples(2)
    assert prompts_of(groups) == ["p0", "p1", "p2", "p0"]
    assert [[s.index for s in g] for g in groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [{s.group_index for s in g} for g in groups] == [{0}, {1}, {2}, {3}]
    groups[0][0].metadata["mark"] = 1
    groups[0][0].tokens.append(9)
    assert groups[0][1].metadata == {} and groups[3][0].tokens == [0]


def test_an_epoch_ends_with_the_tail_and_the_head_of_a_new_order():
    source = make(5, shuffle=True, seed=1)
    first = prompts_of(source.get_samples(3))
    second = prompts_of(source.get_samples(4))
    assert sorted(first + second[:2]) == [f"p{i}" for i in range(5)]
    third = prompts_of(source.get_samples(3))
    assert sorted(second[2:] + third) == [f"p{i}" for i in range(5)]
    assert source.epoch == 1


def test_one_call_may_span_several_epochs():
    assert Counter(prompts_of(make(3, shuffle=True).get_samples(9))) == {
        "p0": 3,
        "p1": 3,
        "p2": 3,
    }


def test_what_came_back_is_served_first_and_in_order():
    source = make()
    one, two, three = source.get_samples(3)
    source.add_samples([two])
    source.add_samples([one, three])
    assert source.get_buffer_length() == 3
    assert source.get_samples(2) == [two, one]
    served = source.get_samples(2)
    assert served[0] is three and served[1][0].prompt == "p3"


def test_a_buffer_filter_chooses_and_the_rest_is_new():
    def newest(buffer, n):
        return [buffer.pop()]

    source = make(buffer_filter=newest)
    groups = source.get_samples(3)
    source.add_samples(groups)
    served = source.get_samples(3)
    assert served[0] is groups[2] and prompts_of(served[1:]) == ["p3", "p4"]


def test_a_filter_that_forgets_to_take_out_does_not_serve_twice():
    source = make(buffer_filter=lambda buffer, n: buffer[:n])
    groups = source.get_samples(2)
    source.add_samples(groups)
    assert source.get_samples(1) == groups[:1]
    assert source.get_buffer_length() == 1


def test_the_filter_is_not_called_for_an_empty_buffer():
    def explode(buffer, n):
        raise AssertionError("called")

    assert len(make(buffer_filter=explode).get_samples(2)) == 2


@pytest.mark.parametrize("wrong", [lambda b, n: None, lambda b, n: b + b])
def test_a_filter_with_a_wrong_answer_is_named(wrong):
    source = make(buffer_filter=wrong)
    source.add_samples(source.get_samples(2))
    with pytest.raises(HookRunError, match="--buffer-filter-path"):
        source.get_samples(2)


def test_groups_of_a_wrong_size_are_not_taken_back():
    source = make()
    (group,) = source.get_samples(1)
    for wrong in (group[:1], [group], "group"):
        with pytest.raises(HookRunError, match="groups of 2 samples"):
            source.add_samples([wrong])


def test_a_source_without_prompts_is_refused():
    with pytest.raises(DataError, match="at least one prompt"):
        PromptDataSource([], 1)


def test_a_restored_source_refuses_other_data_order_and_group_size():
    source = make(shuffle=True, seed=1)
    source.add_samples(source.get_samples(1))
    state = source.state_dict()
    changed = PromptDataSource([Sample(prompt=f"q{i}") for i in range(5)], 2, shuffle=True, seed=1)
    for other, message in [
        (make(6, shuffle=True, seed=1), "num_prompts 5 there, 6 here"),
        (changed, "the prompts themselves differ"),
        (make(shuffle=False, seed=1), "--rollout-shuffle"),
        (make(shuffle=True, seed=2), "--rollout-seed"),
        (make(5, 3, shuffle=True, seed=1), "--n-samples-per-prompt 2"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(state)
        assert other.get_samples(1)[0][0].index == 0


def test_a_damaged_state_is_refused_and_changes_nothing():
    state = make().state_dict()
    for damage in (
        {"version": 9},
        {"buffer": [[{"status": "dreaming"}]]},
        {"buffer": None},
        {"position": "x"},
        {"position": 77},
        {"epoch": -1},
    ):
        source = make()
        with pytest.raises(CheckpointError):
            source.load_state_dict({**state, **damage})
        assert prompts_of(source.get_samples(1)) == ["p0"]
    with pytest.raises(CheckpointError):
        make().load_state_dict({})


def test_group_size_may_change_while_nothing_waits():
    source = make(5, 2)
    source.get_samples(2)
    wider = make(5, 4)
    wider.load_state_dict(source.state_dict())
    (group,) = wider.get_samples(1)
    assert [s.index for s in group] == [4, 5, 6, 7] and group[0].prompt == "p2"


steps = st.lists(
    st.tuples(st.sampled_from(["get", "put back", "restore"]), st.integers(0, 7)), max_size=40
)


@settings(max_examples=150, deadline=None)
@given(
    script=steps,
    num_prompts=st.integers(1, 9),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
def test_no_prompt_is_skipped_or_doubled_whatever_comes_back_and_whenever_it_is_restored(
    script, num_prompts, shuffle, seed
):
    """Beside a source that is never restored; what was served is whole epochs and a rest."""
    options = {"shuffle": shuffle, "seed": seed}
    source, steady = make(num_prompts, **options), make(num_prompts, **options)
    held, held_steady, used = [], [], []
    for action, count in script:
        if action == "restore":
            # What is held at a checkpoint is put back first: nothing is in flight then.
            source.add_samples(held)
            steady.add_samples(held_steady)
            held, held_steady = [], []
            source = reload(source, **options)
        elif action == "put back":
            source.add_samples(held[:count])
            steady.add_samples(held_steady[:count])
            held, held_steady = held[count:], held_steady[count:]
        else:
            used += held
            held, held_steady = source.get_samples(count), steady.get_samples(count)
            assert len(held) == count
            assert held == held_steady
    waiting = source.get_samples(source.get_buffer_length())
    seen = used + held + waiting
    assert sorted(g[0].group_index for g in seen) == list(range(len(seen)))
    counts = Counter(prompts_of(seen))
    whole, rest = divmod(len(seen), num_prompts)
    assert all(counts[f"p{i}"] in (whole, whole + 1) for i in range(num_prompts))
    assert sum(counts[f"p{i}"] == whole + 1 for i in range(num_prompts)) == rest
