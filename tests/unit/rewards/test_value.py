import numpy
import pytest

from dovetail.rewards.value import RewardFault, as_reward, as_rewards


@pytest.mark.parametrize("value", [1, 1.0, True, numpy.float32(1), numpy.int64(1), numpy.array(1)])
def test_numbers_of_every_library_become_floats(value):
    reward = as_reward(value, ())
    assert reward == 1.0 and type(reward) is float


def test_a_tensor_of_one_element_is_a_number():
    torch = pytest.importorskip("torch")
    assert as_reward(torch.tensor(0.5), ()) == 0.5


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "none"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "inf"),
        ("1.0", "wrong_type"),
        ([1.0, 2.0], "wrong_type"),
        (numpy.zeros(3), "wrong_type"),
        (10**400, "wrong_type"),
        (object(), "wrong_type"),
        ({"score": 1.0}, "unexpected_object"),
    ],
)
def test_what_is_no_finite_number_has_a_name(value, kind):
    with pytest.raises(RewardFault) as caught:
        as_reward(value, ())
    assert caught.value.kind == kind


def test_with_keys_an_object_keeps_its_entries_and_a_number_gets_all_keys():
    assert as_reward({"score": 1, "pred": "x"}, ("score", "acc")) == {"score": 1.0, "pred": "x"}
    assert as_reward(0.5, ("score", "acc")) == {"score": 0.5, "acc": 0.5}


@pytest.mark.parametrize(
    ("value", "kind"),
    [({"acc": 1}, "missing_key"), ({"score": "1"}, "wrong_type"), ({"score": None}, "none")],
)
def test_with_keys_the_trained_entry_must_be_a_number(value, kind):
    with pytest.raises(RewardFault) as caught:
        as_reward(value, ("score",))
    assert caught.value.kind == kind


def test_a_groups_rewards_are_a_list_of_its_length():
    assert as_rewards((1, 2), 2) == [1, 2]
    assert as_rewards(numpy.array([1.0, 2.0]), 2) == [1.0, 2.0]
    for values, kind in [
        (None, "none"),
        (1.0, "wrong_type"),
        ("ab", "wrong_type"),
        ([1], "wrong_length"),
    ]:
        with pytest.raises(RewardFault) as caught:
            as_rewards(values, 2)
        assert caught.value.kind == kind
