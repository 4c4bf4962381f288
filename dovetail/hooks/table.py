"""The table of hooks: one row per function that a user may put into the loop."""

from __future__ import annotations

from difflib import get_close_matches

from dovetail.hooks.rows.algorithms import ALGORITHMS
from dovetail.hooks.rows.batch import BATCH
from dovetail.hooks.rows.data import DATA
from dovetail.hooks.rows.owned import MEGATRON, MULTI_TURN, ROUTER, WEIGHTS
from dovetail.hooks.rows.rewards import REWARDS
from dovetail.hooks.rows.rollout import ROLLOUT
from dovetail.hooks.rows.session import SESSION
from dovetail.hooks.spec import HookSpec
from dovetail.types import HookError

HOOKS: tuple[HookSpec, ...] = (
    *DATA,
    *ROLLOUT,
    *REWARDS,
    *BATCH,
    *ALGORITHMS,
    *MEGATRON,
    *ROUTER,
    *SESSION,
    *MULTI_TURN,
    *WEIGHTS,
)


def spec_of(slot: str) -> HookSpec:
    """The row of a slot.

    Raises:
        HookError: there is none; the message has the nearest.
    """
    rows = {spec.slot: spec for spec in HOOKS}
    if slot in rows:
        return rows[slot]
    near = get_close_matches(slot, rows, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise HookError(f"there is no hook {slot!r}{hint}. There are: {', '.join(rows)}")
