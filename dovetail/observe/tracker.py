"""Trackers by name: the table of built-in ones, open to entry points of the group
`dovetail.trackers`.

An entry point names a callable that takes a `TrackerSetup` and gives an object with `log(metrics,
step)` and `close()`. A tracker that fails is reported once and left out from then on; the run goes
on.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from dovetail.observe.run_dir import RunDir
from dovetail.types.errors import ConfigError, MissingExtraError
from dovetail.types.ports import Tracker

log = logging.getLogger(__name__)

ENTRY_POINTS = "dovetail.trackers"


@dataclass(frozen=True, slots=True)
class TrackerSetup:
    """What a tracker may need to start."""

    run_dir: RunDir
    run_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration, as plain values."""
    resumed_after: int | None = None
    """Finished steps at which this run goes on; None: a fresh run."""
    wandb_project: str = "dovetail"
    wandb_group: str | None = None
    wandb_mode: str = "online"


@dataclass(frozen=True, slots=True)
class TrackerRow:
    """One built-in tracker."""

    name: str
    doc: str
    path: str
    """`module:attribute` of a callable that takes a `TrackerSetup`."""


TRACKERS = (
    TrackerRow(
        "jsonl",
        "metrics.jsonl in the run directory",
        "dovetail.observe.trackers.jsonl:JsonlTracker",
    ),
    TrackerRow(
        "tensorboard",
        "TensorBoard events in the run directory",
        "dovetail.observe.trackers.tensorboard:TensorBoardTracker",
    ),
    TrackerRow(
        "wandb",
        "Weights & Biases (extra: wandb)",
        "dovetail.observe.trackers.wandb:WandbTracker",
    ),
)


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._active = dict(trackers)

    @property
    def active(self) -> list[str]:
        """Names of the trackers that work."""
        return list(self._active)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Give `metrics` of `step` to every tracker that still works."""
        for name, tracker in list(self._active.items()):
            self._guard(name, partial(tracker.log, metrics, step))

    def close(self) -> None:
        """Close every tracker; a second call does nothing."""
        for name, tracker in list(self._active.items()):
            self._guard(name, tracker.close)
        self._active = {}

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        # Foreign code with a network behind it: whatever it raises, training is worth more.
        except Exception as error:
            self._active.pop(name, None)
            log.warning("tracker %s failed and is off from now on", name, exc_info=error)


def tracker_names() -> list[str]:
    """Every tracker that can be named: the table's rows, then installed entry points."""
    return [*(row.name for row in TRACKERS), *sorted(e.name for e in _entry_points())]


def check_trackers(names: Iterable[str]) -> None:
    """Refuse, before a run, names that `open_trackers` would refuse.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in names:
        _factory(name)


def open_trackers(names: Iterable[str], setup: TrackerSetup) -> Trackers:
    """Start the trackers `names`. One that can't start is reported and left out.

    Raises:
        ConfigError: a name is unknown.
        MissingExtraError: a tracker needs a package that is not installed.
    """
    factories = {name: _factory(name) for name in dict.fromkeys(names)}
    opened: dict[str, Tracker] = {}
    for name, factory in factories.items():
        try:
            opened[name] = factory(setup)
        except MissingExtraError:
            Trackers(opened).close()
            raise
        # As in Trackers.log: a tracker that is down must not keep a run from starting.
        except Exception as error:
            log.warning("tracker %s can't start and is off", name, exc_info=error)
    return Trackers(opened)


def _factory(name: str) -> Callable[[TrackerSetup], Tracker]:
    for row in TRACKERS:
        if row.name == name:
            module, _, attribute = row.path.partition(":")
            return getattr(importlib.import_module(module), attribute)
    for entry in _entry_points():
        if entry.name == name:
            return _load_entry(entry)
    known = tracker_names()
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(
        f"unknown tracker {name!r}; {hint}known: {', '.join(known)}, and what is installed as an "
        f"entry point of the group {ENTRY_POINTS}; --trackers (TOML: observe.trackers)"
    )


def _load_entry(entry: Any) -> Callable[[TrackerSetup], Tracker]:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"tracker {entry.name!r} ({entry.value}) can't be imported: {error} "
            "(--trackers, TOML: observe.trackers)"
        ) from error


def _entry_points() -> list[Any]:
    return list(entry_points(group=ENTRY_POINTS))
