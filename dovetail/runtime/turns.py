"""Engines and trainer on the same devices: one works while the other has given its memory up.

    rollout           | train                    | publish            | rollout
    trainer offloaded | trainer on its device    | gathers, offloaded |
    engines awake     | engines asleep           | awake, new weights |

Each side is a context manager; `Turns` is inside exactly one of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol


class Offloading(Protocol):
    """A trainer that can give its devices up."""

    @property
    def alive(self) -> bool: ...

    def offload(self) -> None: ...

    def onload(self) -> None: ...


class Sleeping(Protocol):
    """Engines that can."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@contextmanager
def offloaded(trainer: Offloading) -> Iterator[None]:
    """The trainer keeps everything in CPU memory inside. One that is not there has nothing to give
    up, and one that was lost is built anew on its device."""
    if trainer.alive:
        trainer.offload()
    try:
        yield
    finally:
        if trainer.alive:
            trainer.onload()


@contextmanager
def asleep(engines: Sleeping) -> Iterator[None]:
    """The engines hold no weights and no keys and values inside, and all requests wait."""
    engines.sleep()
    try:
        yield
    finally:
        engines.wake()


class Turns:
    """Whose turn it is. At first nobody's: the trainer is on its device, no engine has started.

    Args:
        trainer: what is offloaded while engines work; None: it stays where it is.
        engines: what sleeps while the trainer works; None: nothing.
    """

    def __init__(self, trainer: Offloading | None = None, engines: Sleeping | None = None) -> None:
        self._trainer, self._engines = trainer, engines
        self._of: str | None = None
        self._inside = ExitStack()

    @property
    def of_engines(self) -> bool:
        """Whether the trainer may be offloaded."""
        return self._of == "engines"

    def trainer_works(self) -> None:
        """Have the engines sleep, then the trainer take its device. A second call does nothing."""
        engines = self._engines
        self._pass_to("trainer", None if engines is None else asleep(engines))

    def engines_work(self) -> None:
        """Offload the trainer, then wake the engines. Weights must reach them before the next
        request. A second call does nothing."""
        trainer = self._trainer
        self._pass_to("engines", None if trainer is None else offloaded(trainer))

    def both_work(self) -> None:
        """The trainer on its device and engines awake, while weights go from hand to hand."""
        self._pass_to("both", None)

    @contextmanager
    def trainer_for_a_moment(self, reload: Callable[[], None]) -> Iterator[None]:
        """The trainer works inside. Engines whose turn it was go on afterwards, whatever happens;
        those that slept have lost their weights, which `reload` gives them again."""
        interrupts = self.of_engines
        self.trainer_works()
        try:
            yield
        finally:
            if interrupts:
                self.engines_work()
                if self._engines is not None:
                    reload()

    def _pass_to(self, whose: str, enter: AbstractContextManager[None] | None) -> None:
        """When it fails to begin, everything is as it was; when the other can't go on, nobody is
        inside anything."""
        if self._of == whose:
            return
        coming = ExitStack()
        if enter is not None:
            coming.enter_context(enter)
        with ExitStack() as undone:
            undone.push(coming)
            before, self._inside, self._of = self._inside, ExitStack(), None
            # Not earlier: whoever takes memory needs what the other has given up.
            before.close()
            self._inside, self._of = undone.pop_all(), whose
