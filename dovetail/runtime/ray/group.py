"""The ranks of a trainer as actors, used as one.

    every call goes to all ranks at once -> all answers -> the value of rank 0
                                         -> one is gone, or raised: the others, which hang in a
                                            collective, are killed -> its error, named by its rank

A group that lost a process is started anew with `restart`; what its ranks held is lost then.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dovetail.config.leaves import cure
from dovetail.runtime.ray.actor import Answer, Holder, Stage
from dovetail.runtime.ray.placement import Place, Placement
from dovetail.types.errors import DovetailError, TrainerLostError, TrainError

log = logging.getLogger(__name__)

MAKER = "dovetail.run.rank:RankWorker"
_LOOK_EVERY_S = 0.2
_OTHERS_S = 2.0
"""That the other ranks have to answer too, once one has failed."""
_CLOSE_S = 5.0
_MOST_NAMED = 5
_GPU_SHARE = 0.5
"""Of a GPU: an engine may have the other half."""
AGREEMENT = 1e-3
"""By how much, relatively, metrics of two ranks may differ."""


class TrainerGroup:
    """All ranks of a trainer. Used from any one thread at a time.

    Args:
        where: the places of the ranks, in their order; asked at each start.
        stage: what each process needs, by its name.
        job: what each rank is told: `run.rank.Job`, as plain data; asked at each start.
        check: called now and then while ranks work; may raise where waiting on is of no use.
        meet_timeout_s: longest wait for all processes to be there and to have met.
    """

    def __init__(
        self,
        where: Callable[[], tuple[Placement, Sequence[Place]]],
        stage: Callable[[str], Stage],
        job: Callable[[], Mapping[str, Any]],
        check: Callable[[], object] = lambda: None,
        meet_timeout_s: float = math.inf,
    ) -> None:
        self._where, self._stage, self._job, self._check = where, stage, job, check
        self._meet_timeout_s = meet_timeout_s
        self._actors: list[Any] = []
        self.changed = False
        """Whether the latest `train` has changed the weights, as far as can be known."""
        self.worst_tokens: list[Any] = []
        self.restarts = 0

    @property
    def alive(self) -> bool:
        """Whether it can be asked anything."""
        return bool(self._actors)

    def start(self) -> None:
        """Start the processes, have them meet, and build the trainer on each.

        Raises:
            DovetailError: what a rank raised; none of them is left.
            TrainerLostError: they are not there, or have not met, in time.
        """
        placement, places = self._where()
        job = dict(self._job())
        self._actors = [
            placement.actor(Holder, place, gpus=_GPU_SHARE).remote(
                self._stage(_name(rank)), MAKER, {"rank": rank, "job": job}
            )
            for rank, place in enumerate(places)
        ]
        address = places[0].address
        deadline = time.monotonic() + self._meet_timeout_s
        # A call waits for its process, and that for its place.
        self._ask("there", deadline=deadline)
        (port,) = self._ask("invite", address, ranks=[0], deadline=deadline)
        # Ranks wait for one another as long, and their own error says more.
        self._ask("meet", address, port, deadline=deadline + self._meet_timeout_s + _OTHERS_S)
        self._ask("build")

    def restart(self) -> None:
        """Start all processes anew: weights and optimizer are those of the beginning then.

        Raises:
            DovetailError: as `start`.
        """
        self.kill()
        self.restarts += 1
        self.changed = False
        self.start()

    # What a run asks of a trainer

    def train(self, rows: Sequence[Any], rollout_id: int = 0) -> dict[str, float]:
        """As `Trainer.train`; the rows travel to each node once.

        Raises:
            TrainError: also where ranks came to different numbers.
        """
        import ray

        self.changed, self.worst_tokens = False, []
        shared = ray.put(list(rows))
        trained = self._ask("train", shared, rollout_id)
        self.changed = any(one.changed for one in trained)
        self.worst_tokens = trained[0].worst_tokens
        found = [one.metrics for one in trained]
        check_agreement(found)
        return dict(found[0])

    def save_into(self, directory: Path, in_background: bool = False) -> dict[str, Any]:
        """Have every rank write its part; facts for `load_from`. `in_background`: come back when
        all have copied it."""
        return dict(self._ask("save_into", str(directory), in_background)[0])

    def has_saved(self) -> bool:
        """Whether every rank is done with a save in the background, however that went."""
        return all(self._ask("has_saved"))

    def finish_save(self) -> None:
        """Wait for the files of a save in the background.

        Raises:
            CheckpointError: they can't be written.
        """
        self._ask("finish_save")

    def load_from(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """Go on from what `save_into` of a group of any size wrote."""
        self._ask("load_from", str(directory), dict(facts))

    def announce(self, version: int, num_engines: int) -> Any:
        """Have rank 0 say where so many engines meet it; a `Snapshot`."""
        return self._ask("announce", version, num_engines, ranks=[0])[0]

    def publish(self, version: int) -> Any:
        """Have the ranks send the weights to the engines; a `Snapshot`, or a BrokenUpdateError."""
        return self._ask("publish", version)[0]

    def retire(self, version: int) -> None:
        """Engines have this version, or a later one."""
        self._ask("retire", version)

    def export(self, path: Path) -> None:
        """Write a Hugging Face directory."""
        self._ask("export", str(Path(path).absolute()))

    def export_critic(self) -> None:
        """Write the critic where critic_save says."""
        self._ask("export_critic")

    def offload(self) -> None:
        """Give the devices' memory up."""
        self._ask("offload")

    def onload(self) -> None:
        """Take it again."""
        self._ask("onload")

    def close(self) -> None:
        """End the processes, which remove what they published."""
        if not self._actors:
            return
        import ray

        ending = [actor.call.remote("close") for actor in self._actors]
        ray.wait(ending, num_returns=len(ending), timeout=_CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """Kill the processes, at whatever they are."""
        import ray

        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    # Asking

    def _ask(
        self,
        name: str,
        *given: Any,
        ranks: Sequence[int] | None = None,
        deadline: float = math.inf,
    ) -> list[Any]:
        """What each rank answers, in their order; nobody is waited for after `deadline`."""
        if not self._actors:
            raise TrainerLostError("the trainer's processes are gone")
        asked = range(len(self._actors)) if ranks is None else ranks
        pending = {self._actors[rank].call.remote(name, *given): rank for rank in asked}
        try:
            answers = self._answers(pending, deadline)
        except BaseException:
            self.changed = True
            self.kill()
            raise
        for rank, answer in sorted(answers.items()):
            if rank == 0 or not answer.good:
                self._tell(rank, answer)
        if len(answers) < len(asked) or not all(one.good for one in answers.values()):
            self._failed(name, answers)
        return [answers[rank].value for rank in asked]

    def _answers(self, pending: dict[Any, int], latest: float) -> dict[int, Answer]:
        """By rank. Once one has failed, those that answer within a moment."""
        import ray

        answers: dict[int, Answer] = {}
        deadline = math.inf
        while pending and time.monotonic() < deadline:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=_LOOK_EVERY_S)
            for ref in done:
                rank = pending.pop(ref)
                answers[rank] = self._answer(rank, ref)
                if not answers[rank].good:
                    deadline = min(deadline, time.monotonic() + _OTHERS_S)
            self._check()
            if pending and time.monotonic() > latest:
                raise self._late(sorted(pending.values()))
        return answers

    def _late(self, ranks: Sequence[int]) -> TrainerLostError:
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        logs = ", ".join(self._stage(_name(rank)).log_file for rank in ranks[:_MOST_NAMED])
        return TrainerLostError(
            f"trainer {who} of {len(self._actors)} did not answer within "
            f"{self._meet_timeout_s:g} s of the start: a node is lost or has no room for it, "
            f"or is slow; logs: {logs}; {cure('distributed_timeout_minutes', 'N')} waits longer"
        )

    def _answer(self, rank: int, ref: Any) -> Answer:
        import ray

        try:
            answer: Answer = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            why = _reason(error)
            return Answer(error=TrainerLostError(f"trainer rank {rank} is gone: {why}"))
        except ray.exceptions.RayError as error:
            return Answer(failure=str(error))
        return answer

    def _tell(self, rank: int, answer: Answer) -> None:
        for level, text in answer.warnings:
            log.log(level, "trainer rank %d: %s", rank, text)
        if answer.trace:
            log.info("trainer rank %d:\n%s", rank, answer.trace)

    def _failed(self, name: str, answers: Mapping[int, Answer]) -> NoReturn:
        """Raise the error that came first, as far as can be known."""
        bad = {rank: answer for rank, answer in answers.items() if not answer.good}
        alike = (
            len(bad) == len(self._actors) and len({_said(answer) for answer in bad.values()}) == 1
        )
        rank = min(bad, key=lambda rank: (_severity(bad[rank]), rank))
        # When all ranks raised the same, none of them waits for another.
        if alike and not isinstance(bad[rank].error, TrainerLostError):
            self.changed = any(self._ask("has_changed")) if name == "train" else False
        else:
            self.changed = True
            self.kill()
        raise _named(rank, bad[rank], self._stage(_name(rank)).log_file)


def _name(rank: int) -> str:
    return f"trainer rank {rank}"


def _severity(answer: Answer) -> int:
    """A process that is gone is why others broke off; what is no error of ours may be a broken
    connection to the one that failed."""
    if isinstance(answer.error, TrainerLostError):
        return 0
    return 1 if answer.error is not None else 2


def _said(answer: Answer) -> str:
    return str(answer.error or answer.failure)


def _named(rank: int, answer: Answer, log_file: str) -> DovetailError:
    if isinstance(answer.error, TrainerLostError):
        return answer.error
    if answer.error is not None:
        answer.error.add_note(f"It came from trainer rank {rank}, whose log is {log_file}")
        return answer.error
    own = f"{answer.failure}\n{answer.trace}" if answer.trace else str(answer.failure)
    return TrainError(f"trainer rank {rank} failed ({log_file}): {own}")


def _reason(error: Exception) -> str:
    """Why an actor died, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "exit" in line.lower() or "kill" in line.lower()]
    return (told or lines or ["no reason is known"])[0][:300]


def check_agreement(found: Sequence[Mapping[str, float]]) -> None:
    """Refuse a step in which ranks came to different metrics: they no longer train one model.

    Raises:
        TrainError: with the numbers.
    """
    first = found[0]
    for rank, other in enumerate(found[1:], 1):
        names = [name for name in {**first, **other} if not name.startswith(("time/", "perf/"))]
        differ = [name for name in names if not _agree(first.get(name), other.get(name))]
        if differ:
            listed = ", ".join(
                f"{name} {first.get(name)} and {other.get(name)}" for name in differ[:_MOST_NAMED]
            )
            raise TrainError(
                f"trainer ranks 0 and {rank} came to different numbers: {listed}. A function of "
                "yours in training that draws random numbers, or reads something that differs "
                "between processes, does that: it is called on every rank and has to give the "
                "same on each"
            )


def _agree(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or math.isclose(one, other, rel_tol=AGREEMENT, abs_tol=1e-6)


def staged(base: Stage, directory: Path) -> Callable[[str], Stage]:
    """Makes the stage of a process by its name: its log is in `directory`."""

    def of(name: str) -> Stage:
        file = directory / f"{name.replace(' ', '_')}.log"
        return replace(base, name=name, log_file=str(file))

    return of
