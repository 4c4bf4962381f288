"""What a trainer saves: policy and perhaps a critic, as tensors of one rank or as files of all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.types.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from dovetail.trainers.backend import Backend
    from dovetail.trainers.critic import Critic

_POLICY, _CRITIC = "policy", "critic"
_IN_FRONT = f"{_CRITIC}/"
"""Of the names of the critic's tensors in a state."""
_log = logging.getLogger(__name__)


class SavedParts:
    """The parts of a trainer that have weights."""

    def __init__(self, backend: Backend, critic: Critic | None):
        self.backend, self.critic = backend, critic

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The live tensors of one rank alone."""
        tensors, facts = self.backend.state_dict()
        if self.critic is not None:
            own, facts[_CRITIC] = self.critic.state_dict()
            tensors = {**tensors, **{f"{_IN_FRONT}{name}": value for name, value in own.items()}}
        return tensors, facts

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Copy such a state in place.

        Raises:
            CheckpointError: it belongs to another model.
            ConfigError: it is of a run without a critic, and this one has one.
        """
        of_critic = {name: v for name, v in tensors.items() if name.startswith(_IN_FRONT)}
        own = {name: value for name, value in tensors.items() if name not in of_critic}
        self.backend.load_state_dict(own, facts)
        if self._loads_critic(bool(of_critic)):
            assert self.critic is not None
            named = {name.removeprefix(_IN_FRONT): value for name, value in of_critic.items()}
            self.critic.load_state_dict(named, facts[_CRITIC])

    def save_into(self, directory: Path, in_background: bool) -> dict[str, Any]:
        """Write each part into a folder of its own; see `Backend.save`."""
        facts: dict[str, Any] = {}
        for name, part in self._parts().items():
            own = directory / name
            own.mkdir(exist_ok=True)
            facts[name] = part.save(own, in_background=in_background)
        return facts

    def has_saved(self) -> bool:
        """See `Backend.has_saved`."""
        return all(part.has_saved() for part in self._parts().values())

    def finish_save(self) -> None:
        """See `Backend.finish_save`. Of several failures the first is raised, once all are done."""
        failed: list[CheckpointError] = []
        for part in self._parts().values():
            try:
                part.finish_save()
            except CheckpointError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def load_from(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """See `Backend.load`.

        Raises:
            ConfigError: as `load_state_dict`.
        """
        self._loads_critic(_CRITIC in facts)
        for name, part in self._parts().items():
            part.load(directory / name, facts[name])

    def backends(self) -> list[Backend]:
        """Of policy and critic."""
        return [self.backend, *([] if self.critic is None else [self.critic.backend])]

    def _parts(self) -> dict[str, Backend | Critic]:
        critic = {} if self.critic is None else {_CRITIC: self.critic}
        return {_POLICY: self.backend, **critic}

    def _loads_critic(self, saved: bool) -> bool:
        if self.critic is not None and not saved:
            raise ConfigError(
                "the checkpoint has no critic; continue a run of the same "
                "--advantage-estimator (TOML: algorithm.advantage_estimator)"
            )
        if saved and self.critic is None:
            _log.warning("the checkpoint's critic ends here: this run's estimator has none")
        return self.critic is not None
