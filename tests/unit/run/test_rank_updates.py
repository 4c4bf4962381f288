"""An update that can't be sent: rank 0 tells it as a value, and every rank lives on."""

import dataclasses

import pytest
import torch

from dovetail.config.resolve import resolve
from dovetail.run.on_ray import RankWeights
from dovetail.run.rank import Job, RankWorker
from dovetail.types.errors import BrokenUpdateError, EngineError
from dovetail.types.weights import Snapshot

NAMES = ["a", "b", "c", "d"]


class Trainer:
    """Its own backend; counts what was gathered."""

    def __init__(self):
        self.backend, self.gathered = self, []

    def hf_tensors(self):
        for name in NAMES:
            self.gathered.append(name)
            yield name, torch.ones(2)


class Sender:
    """Fails in the middle of its first try."""

    def __init__(self, error):
        self.errors = [error]

    def send(self, version, tensors):
        next(iter(tensors))
        if self.errors:
            raise self.errors.pop()
        return Snapshot(version=version, directory=None, num_bytes=len(list(tensors)))


def worker(rank, sender=None):
    config = resolve([], ["--mode", "disaggregated"]).config.model_dump(exclude_unset=True)
    facts = {"passthrough": {}, "facts": {}, "schedule": {}, "device": "cpu", "num_threads": 1}
    made = RankWorker(rank, dataclasses.asdict(Job(config=config, world=2, **facts)))
    made.trainer, made._store_of_weights = Trainer(), sender
    return made


@pytest.mark.parametrize("error", [EngineError("no room left"), BrokenUpdateError("engine 1 left")])
def test_a_try_that_fails_is_a_value_all_ranks_gather_to_the_end_and_the_next_succeeds(error):
    ranks = [worker(0, Sender(error)), worker(1)]
    assert [rank.publish(3) for rank in ranks] == [error, None]
    again = [rank.publish(3) for rank in ranks]
    assert again[0].version == 3 and again[1] is None
    for rank in ranks:
        assert rank.trainer.gathered == NAMES * 2


def test_what_is_no_matter_of_engines_travels():
    with pytest.raises(ZeroDivisionError):
        worker(0, Sender(ZeroDivisionError())).publish(1)


class Group:
    """The ranks as the run's process sees them."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def publish(self, version):
        return self.answers.pop(0)


class Turns:
    def __init__(self):
        self.seen = []

    def trainer_works(self):
        self.seen.append("trainer")

    def engines_work(self):
        self.seen.append("engines")


@pytest.mark.parametrize("error", [EngineError("no room left"), BrokenUpdateError("engine 1 left")])
def test_the_run_raises_what_it_is_told_and_no_engine_gets_a_turn_before_a_try_succeeds(error):
    snapshot, turns = Snapshot(version=3, directory=None, num_bytes=1), Turns()
    weights = RankWeights(Group(error, snapshot), turns, meets=False)
    with pytest.raises(EngineError) as caught:
        weights.send(3, ())
    assert caught.value is error and turns.seen == ["trainer"]
    assert weights.send(3, ()) is snapshot
    assert turns.seen == ["trainer", "trainer", "engines"]
