"""Defaults < TOML files, left to right < flags: one frozen tree, and where each value came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dovetail.config.async_rules import implied_correction
from dovetail.config.engine_rules import engine_owner
from dovetail.config.flags import OwnFlags, read_flags
from dovetail.config.incoming import Incoming
from dovetail.config.leaves import leaves
from dovetail.config.passthrough import without_effect_notes
from dovetail.config.run import RunConfig
from dovetail.config.toml import read_toml
from dovetail.types.errors import ConfigError


@dataclass(frozen=True)
class Resolved:
    """A run as it was asked for."""

    config: RunConfig
    origins: dict[str, str]
    """Leaf name to `default`, `file.toml:section.key` or `flag --name`; every leaf is here."""
    passthrough: dict[str, Any] = field(default_factory=dict)
    """Engine and trainer owners' settings, e.g. {"vllm_max_num_seqs": "64"}."""
    notes: tuple[str, ...] = ()
    """What was accepted although it has no effect in this run; to be shown once."""


def resolve(
    files: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
    own_flags: OwnFlags | None = None,
) -> Resolved:
    """Merge run files and flags over the defaults.

    Whether the values make sense together is not looked at; see `dovetail.config.check`.
    `own_flags` gives a parser for flags that the user's functions bring along.

    Example:
        >>> resolve([], ["--rollout-batch-size", "32"]).config.rollout.rollout_batch_size
        32

    Raises:
        ConfigError: an unknown name, a wrong or out-of-bounds value, an unreadable file.
    """
    incoming = Incoming()
    for path in files:
        read_toml(Path(path), incoming)
    read_flags(flags, incoming, own_flags)
    config = _validate(incoming)
    notes = list(dict.fromkeys(incoming.notes))
    correction = implied_correction(config, incoming.values)
    if correction is not None:
        incoming.values["use_tis"], incoming.origins["use_tis"] = True, "implied by max_lag"
        notes.append(correction)
        config = _validate(incoming)
    trains = config.trainer.train_backend
    notes += without_effect_notes(incoming.passthrough, engine_owner(config), trains)
    return Resolved(
        config=config,
        origins={name: incoming.origins.get(name, "default") for name in leaves()},
        passthrough=incoming.passthrough,
        notes=tuple(notes),
    )


def _validate(incoming: Incoming) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in incoming.values.items():
        tree.setdefault(leaves()[name].section, {})[name] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, incoming)) from None


def _explain(error: ValidationError, incoming: Incoming) -> str:
    lines = {}
    for problem in error.errors():
        leaf = leaves()[str(problem["loc"][1])]
        got = incoming.values[leaf.name]
        lines[leaf.name] = (
            f"{leaf.name} got {got!r} from {incoming.origins[leaf.name]}, expected {leaf.expected} "
            f"(flag: {leaf.flag}, TOML: {leaf.key})"
        )
    return "\n".join(lines.values())
