"""`args` as plugins of the slime family use it."""

import copy
import pickle

import pytest

from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView


def view(**sections):
    return ArgsView(RunConfig.model_validate(sections), start_rollout_id=3)


def test_leaves_are_flat_attributes_and_facts_stand_beside_them():
    args = view(rollout={"rollout_batch_size": 5}, optimizer={"lr": 0.5})
    assert (args.rollout_batch_size, args.lr, args.start_rollout_id) == (5, 0.5, 3)
    assert "lr" in args and vars(args)["lr"] == 0.5


def test_leaves_that_default_to_another_are_filled_in():
    args = view(
        rollout={"rollout_batch_size": 5, "n_samples_per_prompt": 4, "rollout_temperature": 0.7}
    )
    assert args.over_sampling_batch_size == 5 and args.eval_temperature == 0.7
    assert args.global_batch_size == 20


def test_foreign_spellings_are_there():
    assert view().disable_grpo_std_normalization is False
    assert view(algorithm={"grpo_std_normalization": False}).disable_grpo_std_normalization is True
    assert view(runtime={"mode": "colocated"}).colocate is True


def test_writes_stay_local():
    config = RunConfig()
    args = ArgsView(config)
    args.lr = 7.0
    args.results_dict = {}
    args.rollout_stop.append("x")
    assert (args.lr, args.results_dict, config.optimizer.lr) == (7.0, {}, 1e-6)
    assert config.rollout.rollout_stop == []


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))]
)
def test_it_copies_and_pickles_with_local_writes(through):
    args = view()
    args.results_dict = {"a": [1]}
    other = through(args)
    assert other == args and other.results_dict == {"a": [1]} and type(other) is ArgsView
    other.lr = 9
    assert args.lr == 1e-6


def test_an_unknown_name_says_the_nearest_and_getattr_defaults_work():
    args = view()
    with pytest.raises(AttributeError, match="did you mean 'rollout_batch_size'"):
        _ = args.rollout_batch_sizes
    assert getattr(args, "max_turns", 4) == 4 and not hasattr(args, "tis_mode")
