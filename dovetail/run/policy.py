"""The trained policy as the loop sees it: one trainer in this process, or ranks on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.checkpoint import hf
from dovetail.checkpoint.hf_export import save_hf_tensors
from dovetail.config.leaves import cure
from dovetail.run.training import export_critic
from dovetail.types import CheckpointError

if TYPE_CHECKING:
    from dovetail.checkpoint.manager import Checkpoint, Part, WritingPart
    from dovetail.run.training import TrainerParts
    from dovetail.runtime.fleet import Fleet
    from dovetail.runtime.ray.group import TrainerGroup
    from dovetail.runtime.turns import Turns
    from dovetail.trainers.trainer import Trainer

POLICY = "policy"
"""The part of a checkpoint."""


class Policy(Protocol):
    """What the loop needs of a trainer."""

    @property
    def restarts(self) -> int:
        """How often its processes were started anew."""
        ...

    @property
    def changed(self) -> bool:
        """Whether the latest `train` has changed the weights so far."""
        ...

    @property
    def worst_tokens(self) -> Sequence[Any]: ...

    def start(self) -> None:
        """Start what has processes of its own."""
        ...

    def train(self, rows: Sequence[Any], rollout_id: int) -> dict[str, float]: ...

    def part(self, in_background: bool = False) -> Part | WritingPart:
        """What a checkpoint keeps of it. `in_background`: a part that writes itself comes back when
        all is copied, and `finish_save` waits for its files."""
        ...

    def has_saved(self) -> bool:
        """Whether `finish_save` has nothing to wait for."""
        ...

    def finish_save(self) -> None:
        """Wait for the files of a part that is written in the background.

        Raises:
            CheckpointError: one can't be written.
            TrainerLostError: nobody is left to write them.
        """
        ...

    def load(self, checkpoint: Checkpoint) -> None: ...

    def export(self, path: Path) -> None:
        """Write a Hugging Face directory."""
        ...

    def export_critic(self) -> None: ...

    def restart(self) -> None:
        """Start lost processes anew, with the weights of the beginning."""
        ...

    def close(self) -> None: ...


class LocalPolicy:
    """Implements `Policy` by a trainer of this process."""

    def __init__(self, trainer: Trainer, parts: TrainerParts) -> None:
        self.trainer, self._parts = trainer, parts

    @property
    def restarts(self) -> int:
        """As `Policy.restarts`: none without the run."""
        return 0

    @property
    def changed(self) -> bool:
        """As `Policy.changed`."""
        return self.trainer.changed

    @property
    def worst_tokens(self) -> Sequence[Any]:
        """As `Trainer.worst_tokens`."""
        return self.trainer.worst_tokens

    def start(self) -> None:
        """There is nothing to start."""

    def train(self, rows: Sequence[Any], rollout_id: int) -> dict[str, float]:
        """As `Trainer.train`."""
        return self.trainer.train(rows, rollout_id)

    def part(self, in_background: bool = False) -> Part | WritingPart:
        """The live tensors."""
        return self.trainer.state_dict()

    def has_saved(self) -> bool:
        """As `Policy.has_saved`."""
        return True

    def finish_save(self) -> None:
        """As `Policy.finish_save`: the checkpoint wrote them itself."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from it, also from one that several ranks wrote.

        Raises:
            CheckpointError: it has no policy of this kind.
        """
        if POLICY in checkpoint.written:
            where, facts = checkpoint.directory(POLICY), checkpoint.written[POLICY]
            self.trainer.load_from(where, facts)
        else:
            self.trainer.load_state_dict(*checkpoint.part(POLICY))

    def export(self, path: Path) -> None:
        """As `Policy.export`."""
        models = self._parts.models
        if self._parts.config.trainer.lora_rank:
            backend = self.trainer.backend
            save_hf_tensors(
                models.model,
                backend.hf_tensors(),
                models.tokenizer,
                path,
                beside=backend.beside_export(),
            )
        else:
            hf.save_hf(models.model, models.tokenizer, path)

    def export_critic(self) -> None:
        """As `Policy.export_critic`."""
        export_critic(self._parts, self.trainer)

    def restart(self) -> None:
        """Nothing of it can be lost alone."""
        raise AssertionError("a trainer of this process is not lost without the run")

    def close(self) -> None:
        """There is nothing to end."""


class RemotePolicy:
    """Implements `Policy` by ranks on a cluster.

    Args:
        group: the ranks.
        turns: whose turn it is on shared devices.
        fleet: the engines, which have weights to take again when their turn was interrupted.
        open_cluster: called before the first start.
    """

    def __init__(
        self,
        group: TrainerGroup,
        turns: Turns,
        fleet: Fleet | None,
        open_cluster: Callable[[], None],
    ) -> None:
        self.group, self.turns, self._fleet = group, turns, fleet
        self._open = open_cluster

    @property
    def restarts(self) -> int:
        """As `Policy.restarts`."""
        return self.group.restarts

    @property
    def changed(self) -> bool:
        """As `Policy.changed`; true when nobody can be asked any more."""
        return self.group.changed

    @property
    def worst_tokens(self) -> Sequence[Any]:
        """As `Trainer.worst_tokens`."""
        return self.group.worst_tokens

    def start(self) -> None:
        """Start the cluster and the ranks.

        Raises:
            DovetailError: the cluster has no room, or what a rank raised.
        """
        self._open()
        self.group.start()

    def train(self, rows: Sequence[Any], rollout_id: int) -> dict[str, float]:
        """As `Trainer.train`, on every rank."""
        self.turns.trainer_works()
        return self.group.train(rows, rollout_id)

    def part(self, in_background: bool = False) -> Part | WritingPart:
        """Every rank writes into one directory."""

        def write(directory: Path) -> Mapping[str, Any]:
            with self._turn():
                return self.group.save_into(directory, in_background)

        return write

    def has_saved(self) -> bool:
        """As `Policy.has_saved`."""
        return self.group.has_saved()

    def finish_save(self) -> None:
        """As `Policy.finish_save`."""
        self.group.finish_save()

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from what ranks of any number wrote.

        Raises:
            CheckpointError: it was written by a run in one process.
        """
        if POLICY not in checkpoint.written:
            raise CheckpointError(
                f"{checkpoint.path} is of a run in mode local, whose state ranks do not read; go "
                f"on with {cure('mode', 'local')}, or begin with its weights: `dovetail convert "
                f"{checkpoint.path} DIR`, then {cure('hf_checkpoint', 'DIR')} without --load"
            )
        self.group.load_from(checkpoint.directory(POLICY), checkpoint.written[POLICY])

    def export(self, path: Path) -> None:
        """As `Policy.export`; rank 0 writes, while all gather."""
        with self._turn():
            self.group.export(path)

    def export_critic(self) -> None:
        """As `Policy.export_critic`."""
        with self._turn():
            self.group.export_critic()

    def restart(self) -> None:
        """As `Policy.restart`."""
        self.group.kill()
        self.turns.trainer_works()
        self.group.restart()

    def close(self) -> None:
        """End the ranks."""
        self.group.close()

    def _turn(self) -> AbstractContextManager[None]:
        """The trainer works for a moment; engines that were at work go on with their weights."""
        fleet = self._fleet
        return self.turns.trainer_for_a_moment(lambda: None if fleet is None else fleet.reload())
