"""Data sources: a small one of our own for other hooks, and the user's under test."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from dovetail.config.run import RunConfig
from dovetail.run.rehearse.samples import prompts
from dovetail.run.rehearse.verdict import NotInRehearsal
from dovetail.types import Group


class FewPrompts:
    """A data source over the few prompts of the rehearsal, round and round."""

    def __init__(self, config: RunConfig, missing: list[str]) -> None:
        self._prototypes, self.made_up = prompts(config, missing)
        self._size = config.rollout.n_samples_per_prompt
        self._numbers, self._indices = itertools.count(), itertools.count()
        self.buffer: list[Group] = []
        self.metadata: dict[str, Any] = {}
        self.epoch_id = self.sample_offset = 0
        self.dataset = self._prototypes

    def __len__(self) -> int:
        return len(self._prototypes)

    def get_samples(self, num_samples: int) -> list[Group]:
        """What came back first, then the prompts in turn."""
        taken, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        return taken + [self._fresh() for _ in range(num_samples - len(taken))]

    def _fresh(self) -> Group:
        number = next(self._numbers)
        prototype = self._prototypes[number % len(self._prototypes)]
        group = [copy.deepcopy(prototype) for _ in range(self._size)]
        for sample in group:
            sample.group_index, sample.index = number, next(self._indices)
        return group

    def add_samples(self, samples: list[Group]) -> None:
        """They are served next."""
        self.buffer += samples

    def get_buffer_length(self) -> int:
        """Groups that came back."""
        return len(self.buffer)

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Kept."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        """What was kept."""
        return self.metadata

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept over a rehearsal."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...

    def __call__(self, num_samples: int) -> list[Group]:
        """As `get_samples`: the all-samples hook is handed one object for both."""
        return self.get_samples(num_samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotInRehearsal(f"needs data_source.{name}, which the rehearsal's stand-in lacks")
