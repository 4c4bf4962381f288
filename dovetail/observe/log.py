"""The log of a run: everything from INFO on to a file, warnings to the terminal too."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType

ROOT = "dovetail"
_seen: set[Hashable] = set()


class _TerminalHandler(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: a live display may have taken its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        # A closed terminal must not end the run; the file has the line.
        except (OSError, ValueError):
            return


class _FileHandler(logging.FileHandler):
    """Loses lines while the disk is full; what matters of them is on the terminal too."""

    def handleError(self, record: logging.LogRecord) -> None:
        return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _TerminalFormat(logging.Formatter):
    """One line; the traceback of an exception stays in the file, its last line is shown."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            if str(error) not in text:
                text += f": {type(error).__name__}: {error}"
        return text


class RunLog:
    """Logging of one run, from `open_log` until it is closed. A context manager."""

    def __init__(self, handlers: list[logging.Handler], level_before: int, propagate: bool) -> None:
        self._handlers, self._level_before, self._propagate = handlers, level_before, propagate

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write out what is pending and give logging back as it was."""
        root = logging.getLogger(ROOT)
        warnings = logging.getLogger("py.warnings")
        logging.captureWarnings(False)
        for handler in self._handlers:
            root.removeHandler(handler)
            warnings.removeHandler(handler)
            handler.close()
        self._handlers = []
        root.setLevel(self._level_before)
        root.propagate = self._propagate


def open_log(path: Path | None, terminal_level: int = logging.WARNING) -> RunLog:
    """Send this package's log to the file `path` (appending) and to the terminal (stderr).

    The file has everything from INFO on, and Python's warnings; the terminal what is at least
    `terminal_level`.

    Raises:
        OSError: the file can't be opened.
    """
    root = logging.getLogger(ROOT)
    run_log = RunLog([], root.level, root.propagate)
    terminal = _TerminalHandler(terminal_level)
    terminal.setFormatter(_TerminalFormat())
    handlers: list[logging.Handler] = [terminal]
    if path is not None:
        file = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setLevel(logging.INFO)
        file.setFormatter(
            logging.Formatter(
                "%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"
            )
        )
        handlers.append(file)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(file)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(min(logging.INFO, terminal_level))
    root.propagate = False
    run_log._handlers = handlers
    _seen.clear()
    return run_log


def warn_once(logger: logging.Logger, message: str, *args: object, key: Hashable = None) -> None:
    """Log a warning the first time its `key` (default: `message`) comes up in a run."""
    key = (logger.name, message if key is None else key)
    if key not in _seen:
        _seen.add(key)
        logger.warning(message, *args)
