"""The tables of algorithms: a name, one paragraph, and where the function is. Imports nothing
heavy.

An advantage is `fn(rewards: RewardBatch, config: AlgorithmConfig) -> Tensor [S]`, one value per
sample. A loss is `fn(inputs: TokenInputs, config: AlgorithmConfig) -> (loss [N], {metric: [N]})`:
the value at a token depends on that token's inputs only, so that it may be evaluated piece by
piece.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.types.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Row:
    """One algorithm by name."""

    name: str
    doc: str
    path: str
    """`package.module:attribute`; empty where a hook is the function."""


CUSTOM_LOSS = "custom_loss"


def _table(*rows: Row) -> dict[str, Row]:
    return {row.name: row for row in rows}


ADVANTAGES: Mapping[str, Row] = _table(
    Row(
        "grpo",
        "Reward minus the mean of its group, over the group's standard deviation "
        "(arXiv 2402.03300). Without grpo_std_normalization it is Dr.GRPO's (arXiv 2503.20783).",
        "dovetail.algorithms.advantages.grpo:grpo",
    ),
)
LOSSES: Mapping[str, Row] = _table(
    Row(
        "policy_loss",
        "Clipped policy ratio with separate upper clip and dual clip, KL to the reference, "
        "entropy bonus.",
        "dovetail.algorithms.losses.policy:policy_loss",
    ),
    Row(
        "sft_loss",
        "Cross entropy of the response tokens.",
        "dovetail.algorithms.losses.sft:sft_loss",
    ),
    Row(
        CUSTOM_LOSS,
        "The function of custom_loss_function_path, over whole micro-batches.",
        "",
    ),
)


def load(table: Mapping[str, Row], name: str, flag: str) -> Callable[..., Any]:
    """The function that `name` stands for in `table`; `flag` is the knob that named it.

    Raises:
        ConfigError: no row of that name; the message has the nearest one.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--{flag.replace('_', '-')} (algorithm.{flag}) is {name!r}, expected one of "
            f"{', '.join(table)}{hint}"
        )
    if not table[name].path:
        raise ConfigError(
            f"--{flag.replace('_', '-')} {name} (algorithm.{flag}) needs the function of "
            f"--{name.replace('_', '-')}-function-path (TOML: hooks.{name}_function_path)"
        )
    module, _, attribute = table[name].path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function
