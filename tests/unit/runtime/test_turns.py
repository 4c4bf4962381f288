"""Engines and trainer on shared devices: who rests when, and what is left when one fails."""

import pytest

from dovetail.runtime.turns import Turns, asleep, offloaded
from dovetail.types import TrainError


class Parties:
    """Trainer and engines; what they were told, in order. `fails`: words that raise."""

    alive = True

    def __init__(self):
        self.told, self.fails = [], set()

    def _hear(self, word):
        self.told.append(word)
        if word in self.fails:
            raise TrainError(word)

    def offload(self):
        self._hear("offload")

    def onload(self):
        self._hear("onload")

    def sleep(self):
        self._hear("sleep")

    def wake(self):
        self._hear("wake")

    def take(self):
        told, self.told = self.told, []
        return told


@pytest.fixture
def both():
    return Parties()


@pytest.fixture
def turns(both):
    return Turns(both, both)


def test_each_side_is_a_context_that_is_left_also_when_what_is_inside_fails(both):
    for side, words in ((offloaded, ["offload", "onload"]), (asleep, ["sleep", "wake"])):
        with pytest.raises(ValueError), side(both):
            assert both.told == words[:1]
            raise ValueError
        assert both.take() == words


def test_a_trainer_that_is_not_there_is_neither_offloaded_nor_brought_back(both):
    both.alive = False
    with offloaded(both):
        pass
    assert both.take() == []
    both.alive = True
    with offloaded(both):
        both.alive = False
    assert both.take() == ["offload"]


def test_memory_is_given_up_before_the_other_takes_it(turns, both):
    turns.trainer_works()
    assert both.take() == ["sleep"]
    turns.engines_work()
    assert both.take() == ["offload", "wake"]
    turns.trainer_works()
    assert both.take() == ["sleep", "onload"]


def test_a_second_call_does_nothing(turns, both):
    turns.engines_work()
    turns.engines_work()
    assert both.take() == ["offload"]


def test_both_work_while_weights_go_from_hand_to_hand(turns, both):
    turns.trainer_works()
    turns.both_work()
    turns.engines_work()
    assert both.take() == ["sleep", "wake", "offload"]


def test_who_has_nothing_to_give_up_is_not_asked(both):
    turns = Turns(both, None)
    turns.trainer_works()
    turns.engines_work()
    turns.trainer_works()
    assert both.take() == ["offload", "onload"]


def test_a_turn_that_can_not_begin_leaves_everything_as_it_was(turns, both):
    turns.engines_work()
    both.take()
    both.fails = {"sleep"}
    with pytest.raises(TrainError, match="sleep"):
        turns.trainer_works()
    assert both.take() == ["sleep"] and turns.of_engines
    both.fails = set()
    turns.trainer_works()
    assert both.take() == ["sleep", "onload"]


def test_when_the_other_can_not_go_on_nobody_is_left_resting_and_the_next_turn_is_whole(
    turns, both
):
    turns.trainer_works()
    both.take()
    both.fails = {"wake"}
    with pytest.raises(TrainError, match="wake"):
        turns.engines_work()
    assert both.take() == ["offload", "wake", "onload"] and not turns.of_engines
    both.fails = set()
    turns.engines_work()
    assert both.take() == ["offload"]


def test_a_moment_of_the_trainer_gives_the_engines_their_turn_back_with_their_weights(turns, both):
    turns.engines_work()
    both.take()
    with turns.trainer_for_a_moment(lambda: both.told.append("reload")):
        both.told.append("save")
    assert both.take() == ["sleep", "onload", "save", "offload", "wake", "reload"]


def test_a_moment_that_fails_gives_the_engines_their_turn_back_too(turns, both):
    turns.engines_work()
    both.take()
    with (
        pytest.raises(TrainError, match="no disk"),
        turns.trainer_for_a_moment(lambda: both.told.append("reload")),
    ):
        raise TrainError("no disk")
    assert both.take() == ["sleep", "onload", "offload", "wake", "reload"]


def test_a_trainer_lost_in_its_moment_leaves_the_engines_at_work(turns, both):
    turns.engines_work()
    both.take()
    with (
        pytest.raises(TrainError, match="gone"),
        turns.trainer_for_a_moment(lambda: both.told.append("reload")),
    ):
        both.alive = False
        raise TrainError("gone")
    assert both.take() == ["sleep", "onload", "wake", "reload"]


def test_a_moment_in_the_trainers_own_turn_changes_nothing(turns, both):
    turns.trainer_works()
    both.take()
    with turns.trainer_for_a_moment(lambda: both.told.append("reload")):
        pass
    assert both.take() == []


def test_engines_that_never_sleep_are_not_given_again_what_they_have() -> None:
    turns, given = Turns(), []
    turns.engines_work()
    with turns.trainer_for_a_moment(lambda: given.append("weights")):
        pass
    assert turns.of_engines and given == []
