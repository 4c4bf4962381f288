"""What every data source promises. Point `SOURCES` at one more maker to hold it to the same."""

import json

import pytest

from dovetail.data.source import PromptDataSource
from dovetail.types.ports import DataSource
from dovetail.types.sample import Sample

GROUP_SIZE = 3


def prototypes():
    return [Sample(prompt=f"p{i}", tokens=[i, i], metadata={"i": [i]}) for i in range(7)]


SOURCES = {
    "prompts in file order": lambda: PromptDataSource(prototypes(), GROUP_SIZE),
    "prompts shuffled": lambda: PromptDataSource(prototypes(), GROUP_SIZE, shuffle=True, seed=5),
}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def make(request):
    return request.param


def test_it_is_a_data_source(make):
    assert isinstance(make(), DataSource)


def test_it_gives_exactly_the_groups_asked_for_and_never_runs_dry(make):
    source = make()
    for count in (0, 1, 5, 30):
        groups = source.get_samples(count)
        assert [len(group) for group in groups] == [GROUP_SIZE] * count


def test_indices_are_unique_rise_and_group_siblings(make):
    groups = make().get_samples(20)
    indices = [sample.index for group in groups for sample in group]
    assert indices == sorted(set(indices))
    assert [{s.group_index for s in group} for group in groups] == [{i} for i in range(20)]


def test_samples_are_fresh_and_share_nothing(make):
    first, *others = [sample for group in make().get_samples(14) for sample in group]
    assert first.status is Sample.Status.PENDING and first.reward is None
    first.tokens.append(99)
    first.metadata["i"].append(99)
    assert not any(99 in s.tokens or 99 in s.metadata["i"] for s in others)


def test_groups_put_back_are_served_before_new_ones_and_once(make):
    source = make()
    groups = source.get_samples(4)
    groups[1][0].response = "half"
    source.add_samples(groups[1:3])
    served = source.get_samples(6)
    assert served[:2] == groups[1:3]
    assert len({group[0].group_index for group in [*groups, *served]}) == 8


def test_a_restored_source_gives_the_same_following_groups(make):
    source = make()
    groups = source.get_samples(9)
    groups[2][1].append_response_tokens(tokens=[8], log_probs=[-0.25], text="x")
    source.add_samples(groups[2:5])
    state = json.loads(json.dumps(source.state_dict()))
    restored = make()
    restored.load_state_dict(state)
    assert restored.get_samples(11) == source.get_samples(11)
    assert restored.state_dict() == source.state_dict()
