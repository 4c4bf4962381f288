"""Functions that break the contracts of their hooks, each in one way, and what must be said."""

from tests.loop.wrong_hooks.calls import CRASHES, LOADING, RAISING
from tests.loop.wrong_hooks.rollout import FILTERS, REWARDS, ROLLOUTS
from tests.loop.wrong_hooks.row import Wrong
from tests.loop.wrong_hooks.training import TRAINING

WRONG = (*LOADING, *CRASHES, *RAISING, *REWARDS, *FILTERS, *ROLLOUTS, *TRAINING)

__all__ = ["WRONG", "Wrong"]
