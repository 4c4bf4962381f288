"""The slime family's data sources: made from args alone, continued exactly."""

from __future__ import annotations

import argparse
import copy
import json

import pytest

from dovetail.config.sections import DataConfig
from dovetail.data.build import build_source
from dovetail.data.family_source import (
    DataSource,
    RolloutDataSource,
    RolloutDataSourceWithBuffer,
    pop_first,
)
from dovetail.types import CheckpointError, HookRunError, Sample
from tests.loop.tiny import make_rows, make_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    make_tokenizer(directory / "model")
    return directory / "model", make_rows(directory / "rows.jsonl", count=5)


def args_for(files, **changes):
    model, rows = files
    values = {
        "prompt_data": str(rows),
        "hf_checkpoint": str(model),
        "label_key": "label",
        "n_samples_per_prompt": 2,
        "rollout_seed": 42,
        "rollout_shuffle": True,
    }
    return argparse.Namespace(**{**values, **changes})


def shown(groups):
    return [(s.group_index, s.index, s.prompt, s.label) for group in groups for s in group]


def test_groups_have_the_order_and_the_counters_of_the_built_in_source(files):
    family = RolloutDataSourceWithBuffer(args_for(files))
    from transformers import AutoTokenizer

    data = DataConfig(prompt_data=str(files[1]), label_key="label", rollout_shuffle=True)
    own = build_source(data, 2, AutoTokenizer.from_pretrained(files[0]), None)
    for count in (3, 4, 11):
        assert shown(family.get_samples(count)) == shown(own.get_samples(count))
    assert len(family) == len(own) == 5
    assert (family.epoch_id, family.sample_offset) == (3, 3)
    assert (family.sample_group_index, family.sample_index) == (18, 36)


def test_samples_are_copies(files):
    source = RolloutDataSource(args_for(files))
    (group,) = source.get_samples(1)
    group[0].metadata["mine"] = 1
    group[0].tokens.append(9)
    assert group[1].metadata == {} and group[1].tokens != group[0].tokens
    assert all(not sample.metadata for sample in source.dataset.samples)


def test_without_prompt_data_samples_are_empty(files):
    source = RolloutDataSource(args_for(files, prompt_data=None))
    groups = source.get_samples(2)
    assert [s.index for group in groups for s in group] == [0, 1, 2, 3]
    assert len(source) == 0 and groups[0][0].prompt == ""


def test_the_plain_source_takes_nothing_back(files):
    with pytest.raises(RuntimeError, match="RolloutDataSourceWithBuffer"):
        RolloutDataSource(args_for(files)).add_samples([])


def test_what_came_back_is_served_first_through_the_filter(files):
    source = RolloutDataSourceWithBuffer(args_for(files))
    first = source.get_samples(3)
    source.add_samples(first)
    assert source.get_buffer_length() == 3
    calls = []

    def newest(args, rollout_id, buffer, num_samples):
        calls.append((args is source.args, rollout_id, len(buffer), num_samples))
        return [buffer.pop()]

    source.buffer_filter = newest
    assert [group[0].group_index for group in source.get_samples(2)] == [2, 3]
    assert calls == [(True, None, 3, 2)] and len(source.buffer) == 2
    with pytest.raises(HookRunError, match="groups of 2 samples"):
        source.add_samples([[Sample()]])
    buffer = [1, 2, 3]
    assert pop_first(None, None, buffer, 2) == [1, 2] and buffer == [3]


def test_the_filter_of_the_run_is_bound(files, tmp_path):
    file = tmp_path / "filters.py"
    file.write_text("def last(args, rollout_id, buffer, num_samples):\n    return [buffer.pop()]\n")
    source = RolloutDataSourceWithBuffer(args_for(files, buffer_filter_path=f"{file}:last"))
    source.add_samples(source.get_samples(2))
    assert source.get_samples(1)[0][0].group_index == 1


@pytest.mark.parametrize("way", ["file", "state"])
def test_a_restored_source_goes_on_exactly_with_its_buffer_and_metadata(files, tmp_path, way):
    args = args_for(files, save=str(tmp_path), load=str(tmp_path))
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(7)
    groups[0][0].metadata["start_rollout_id"] = 1
    source.add_samples(groups[:2])
    source.update_metadata({"stage": 3})
    other = RolloutDataSourceWithBuffer(args)
    if way == "file":
        source.save(4)
        other.load(4)
    else:
        other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert other.get_metadata() == {"stage": 3} and other.get_buffer_length() == 2
    assert shown(other.get_samples(6)) == shown(source.get_samples(6))


def test_without_a_file_loading_changes_nothing_and_other_data_is_refused(files, tmp_path):
    source = RolloutDataSourceWithBuffer(args_for(files, load=str(tmp_path)))
    source.get_samples(3)
    source.load(0)
    assert source.sample_offset == 3
    with pytest.raises(CheckpointError, match="9 prompts, this run has 5"):
        source.load_state_dict({**source.state_dict(), "num_prompts": 9})
    with pytest.raises(CheckpointError, match="lacks sample_offset"):
        source.load_state_dict({"epoch_id": 1})


def test_a_copy_shares_the_prompts_but_not_their_order(files):
    source = RolloutDataSource(args_for(files))
    twin = copy.deepcopy(source)
    assert twin.dataset.samples[0] is source.dataset.samples[0]
    del twin.dataset.samples[0]
    assert len(source) == 5


def test_a_plugins_source_is_a_subclass_with_its_own_choice(files):
    class Hardest(RolloutDataSourceWithBuffer):
        def get_samples(self, num_samples):
            return sorted(super().get_samples(num_samples), key=lambda g: g[0].label)

    source = Hardest(args_for(files))
    assert isinstance(source, DataSource)
    labels = [group[0].label for group in source.get_samples(5)]
    assert labels == sorted(labels)


def test_the_class_of_the_guides_has_neither_a_length_nor_a_constructor():
    class Source(DataSource):
        def get_samples(self, num_samples): ...
        def add_samples(self, samples): ...
        def save(self, rollout_id): ...
        def load(self, rollout_id=None): ...

    args = argparse.Namespace(seed=5)
    assert bool(Source()) and Source(args).args is args
