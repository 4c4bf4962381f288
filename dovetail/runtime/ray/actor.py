"""What runs in every process that Ray starts for us: it makes one object of ours and calls it.

No logic lives here. What the object prints goes to a log of its own, what it warns of comes back
with the next answer, and what it raises comes back as the answer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.types.errors import DovetailError

_MOST_WARNINGS = 100


@dataclass(frozen=True, slots=True)
class Stage:
    """What a process needs before anything of ours runs in it."""

    name: str
    """As messages call it, e.g. `trainer rank 1`."""
    log_file: str
    sys_path: tuple[str, ...]
    """Where the run's own process looks for modules, users' ones too."""
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call."""

    value: Any = None
    error: DovetailError | None = None
    """What it raised, if that was an error of ours."""
    failure: str | None = None
    """What else it raised, in a line."""
    trace: str = ""
    """The traceback of either."""
    warnings: tuple[tuple[int, str], ...] = ()
    """Level and text of what was logged from WARNING on."""

    @property
    def good(self) -> bool:
        """Whether nothing was raised."""
        return self.error is None and self.failure is None


class Holder:
    """The class of our actors. `maker`: "module:name" of what makes the object; `given`: its
    arguments."""

    def __init__(self, stage: Stage, maker: str, given: Mapping[str, Any]) -> None:
        _set(stage)
        self._warnings = _Warnings()
        logging.getLogger("dovetail").addHandler(self._warnings)
        self._maker, self._given = maker, dict(given)
        self._made: Any = None
        self._making = threading.Lock()

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def call(self, name: str, *given: Any) -> Answer:
        """The object's method `name`; the object is made first if it is not there yet."""
        try:
            value = getattr(self._object(), name)(*given)
        # Not lost: the answer carries it.
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            sys.stderr.write(trace)
            sys.stderr.flush()
            warnings = self._warnings.take()
            if isinstance(error, DovetailError):
                return Answer(error=_plain(error), trace=trace, warnings=warnings)
            said = "".join(traceback.format_exception_only(error)).strip()
            return Answer(failure=said, trace=trace, warnings=warnings)
        return Answer(value, warnings=self._warnings.take())

    def _object(self) -> Any:
        with self._making:
            if self._made is None:
                module, _, maker = self._maker.partition(":")
                self._made = getattr(importlib.import_module(module), maker)(**self._given)
            return self._made


def _plain(error: DovetailError) -> DovetailError:
    """Without what it came from, which may not travel."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _set(stage: Stage) -> None:
    # A terminal's Ctrl-C is for the run, which ends us. Not the main thread: Ray's own handlers.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    Path(stage.log_file).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(stage.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, number)
    os.close(log)
    # Ray put files of its own in their places.
    sys.stdout = os.fdopen(1, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for name, value in stage.env.items():
        os.environ[name] = value
    if os.path.isdir(stage.cwd):
        os.chdir(stage.cwd)
    sys.path[:] = [*stage.sys_path, *(one for one in sys.path if one not in stage.sys_path)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    own = logging.getLogger("dovetail")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False


class _Warnings(logging.Handler):
    """Keeps what is worth the terminal until the next answer."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._kept) < _MOST_WARNINGS:
            self._kept.append((record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[int, str], ...]:
        kept, self._kept = tuple(self._kept), []
        return kept
