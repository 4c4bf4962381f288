"""Data sources of the user's behind our port."""

import threading

import pytest

from dovetail.config.run import RunConfig
from dovetail.data.family_source import DataSource
from dovetail.hooks import ArgsView, bind
from dovetail.types import DataSourceCall, HookRunError, Sample

ARGS = ArgsView(RunConfig())


class Family:
    def __init__(self, args):
        self.lock, self.at, self.buffer, self.calls = threading.Lock(), 0, [], []

    def get_samples(self, num_samples):
        self.at += num_samples
        return [[Sample(index=self.at)] for _ in range(num_samples)]

    def add_samples(self, samples):
        self.buffer += samples

    def save(self, rollout_id):
        self.calls.append(("save", rollout_id))

    def load(self, rollout_id=None):
        self.calls.append(("load", rollout_id))

    def __len__(self):
        return 40

    def get_buffer_length(self):
        return len(self.buffer)


class Native(Family):
    def __init__(self, call):
        super().__init__(call.args)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def made(target):
    return bind("data_source", target, ARGS)(DataSourceCall())


def test_a_source_with_files_of_its_own_is_told_the_rollout():
    source = made(Family)
    assert source.has_own_files and source.state_dict() == {"foreign": True}
    source.load_state_dict({"foreign": True})
    source.save(3)
    source.load(2)
    assert source.calls == [("save", 3), ("load", 2)]
    assert len(source) == 40 and source.get_buffer_length() == 0


def test_a_source_with_state_gives_and_takes_it():
    source = made(Native)
    source.get_samples(3)
    assert not source.has_own_files and source.state_dict() == {"at": 3}
    source.load_state_dict({"at": 1})
    assert source.at == 1


def test_a_snapshot_undoes_what_an_interrupted_rollout_did():
    source = made(Family)
    source.add_samples([[Sample(index=1, response="old")]])
    before, lock = source.snapshot(), source.lock
    source.get_samples(2)
    source.buffer[0][0].response = "new"
    source.add_samples([[Sample()]])
    source.restore(before)
    assert (source.at, len(source.buffer), source.buffer[0][0].response) == (0, 1, "old")
    assert source.lock is lock
    source.buffer[0][0].response = "newer"
    source.restore(before)
    assert source.buffer[0][0].response == "old"


def test_args_and_tokenizers_stay_the_same_objects():
    class Tokenizer:
        def encode(self, text): ...

        def decode(self, ids): ...

    class Keeping(Family):
        def __init__(self, args):
            super().__init__(args)
            self.args, self.tokenizer = args, Tokenizer()

    source = made(Keeping)
    tokenizer = source.tokenizer
    source.restore(source.snapshot())
    assert source.args is ARGS and source.tokenizer is tokenizer


@pytest.mark.parametrize("wrong", [None, [Sample()], [[]], [[1]], "text"])
def test_prompts_must_be_groups_of_samples(wrong):
    class Wrong(Family):
        def get_samples(self, num_samples):
            return wrong

    with pytest.raises(HookRunError, match=r"Wrong.get_samples\(2\) gave back .*list of groups"):
        made(Wrong).get_samples(2)


def test_what_a_source_raises_names_its_method():
    class Broken(Family):
        def get_samples(self, num_samples):
            raise OSError("gone")

    with pytest.raises(HookRunError, match=r"Broken.get_samples raised OSError: gone \(at .*py:"):
        made(Broken).get_samples(1)


def test_a_factory_must_make_a_source():
    with pytest.raises(HookRunError, match="gave back a int"):
        made(lambda call: 3)

    class Stateless(Family):
        save = None

    with pytest.raises(HookRunError, match=r"load_state_dict\(state\), or save"):
        made(lambda call: Stateless(None))


def test_methods_may_be_async():
    class Async(Family):
        async def get_samples(self, num_samples):
            return [[Sample(index=8)]]

    assert made(Async).get_samples(1)[0][0].index == 8


def test_one_that_cannot_be_made_is_named_by_its_own_place():
    class Unfinished(DataSource):
        def __init__(self, args): ...
        def get_samples(self, num_samples): ...
        def add_samples(self, samples): ...
        def save(self, rollout_id): ...

    with pytest.raises(
        HookRunError, match=r"abstract .*load.* \(at .*test_foreign_source\.py:\d+\)"
    ):
        bind("data_source", Unfinished, ARGS)(DataSourceCall())
