"""Which hooks of a run are rehearsed, and the refusal of a run whose hooks fail."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from dovetail.config.async_rules import STREAMS
from dovetail.config.eval_sets import eval_sets
from dovetail.config.leaves import leaves
from dovetail.config.resolve import Resolved
from dovetail.config.run import RunConfig
from dovetail.hooks import HOOKS
from dovetail.rollout import session
from dovetail.run.rehearse.parent import rehearse
from dovetail.run.rehearse.table import row_of
from dovetail.run.rehearse.verdict import Item, Outcome, Verdict
from dovetail.types import HookError

log = logging.getLogger(__name__)


def items(config: RunConfig) -> list[Item]:
    """Every hook that the configuration names, in the order of the table; a list leaf gives one
    item for each of its entries, an evaluation set's own reward and generate function one each."""
    found = [
        Item(spec.slot, path, spec.leaf)
        for spec in HOOKS
        for path in _paths(getattr(config.hooks, spec.leaf, None))
    ]
    named = {(item.slot, item.path) for item in found}
    for one in eval_sets(config):
        for slot in ("custom_rm", "custom_generate_function"):
            path = getattr(one, f"{slot}_path")
            if path is not None and (slot, path) not in named:
                named.add((slot, path))
                found.append(Item(slot, path, f"{slot}_path"))
    return found


def _paths(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


IN_EVALUATION = (
    "rollout_function",
    "eval_function",
    "custom_generate_function",
    "rollout_sample_hook",
    "custom_rm",
    "custom_eval_rollout_log_function",
    "router_middleware",
)
"""Slots that an evaluation alone calls."""


def rehearse_hooks(resolved: Resolved, slots: Collection[str] | None = None) -> None:
    """Try out the hooks that this run will call (of `slots`), in a process of their own.

    Hooks that can't be loaded are left to the run, which says why; those that could not be judged
    are warned about. `--no-check-hooks` (TOML: hooks.check_hooks) turns it off.

    Raises:
        HookError: hooks that break their contracts, each with the user's line.
    """
    config = resolved.config
    if not config.hooks.check_hooks:
        return
    asked = [
        item
        for item in items(config)
        if _is_used(item, config) and (slots is None or item.slot in slots)
    ]
    if not asked:
        return
    verdicts = list(rehearse(resolved, asked, config.hooks.hook_check_timeout_s))
    for verdict in verdicts:
        for line in _remarks(verdict):
            log.warning("%s %s: %s", _where(verdict.item), verdict.item.path, line)
    faults = [verdict for verdict in verdicts if verdict.outcome is Outcome.FAULT]
    if faults:
        lines = [_told(verdict) for verdict in faults]
        raise HookError(
            "\n".join(lines) + "\nNothing was loaded. To try one alone: dovetail hooks check. To "
            "run without this rehearsal: --no-check-hooks (TOML: hooks.check_hooks = false)"
        )


def _is_used(item: Item, config: RunConfig) -> bool:
    spec = next(spec for spec in HOOKS if spec.slot == item.slot)
    if row_of(item.slot) is None or registered_here(item):
        return False
    if item.slot == "custom_generate_function" and item.path in session.NAMES:
        # Ours: the agent that it runs has an item of its own.
        return False
    if item.slot == "rollout_function" and item.path in STREAMS and config.collects_ahead:
        # Ours, and no function is called.
        return False
    if config.train_only:
        return spec.process == "trainer" or spec.stage == "batch"
    if config.debug.debug_rollout_only:
        return spec.process != "trainer" and spec.stage != "batch"
    return True


def registered_here(item: Item) -> bool:
    """Whether a path is the name of an object of this process, which another one can't see."""
    from dovetail.hooks.load import is_registered

    return is_registered(item.slot, item.path) or item.path.startswith("__main__")


def _remarks(verdict: Verdict) -> Iterator[str]:
    yield from verdict.warnings
    if verdict.outcome is Outcome.UNKNOWN:
        yield f"could not be tried out: {verdict.message}"


def _where(item: Item) -> str:
    leaf = leaves()[item.leaf]
    return f"{leaf.flag} (TOML: {leaf.key})"


def _told(verdict: Verdict) -> str:
    defined = f", defined at {verdict.source}" if verdict.source else ""
    text = f"{_where(verdict.item)}: {verdict.item.path}{defined}: {verdict.message}"
    if verdict.printed:
        text += "\n  it printed: " + verdict.printed[-500:].replace("\n", "\n  ")
    return text
