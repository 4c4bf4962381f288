"""One clear message per error, and the exit code that belongs to it."""

from __future__ import annotations

import errno
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path

from dovetail.types.errors import DovetailError, HookRunError, RewardError, RolloutError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEMORY = ("OutOfMemoryError", "MemoryError")
_OF_USERS_CODE = (HookRunError, RewardError, RolloutError)
_OURS = (str(Path(__file__).parents[1]), "<frozen")
_STANDARD = sysconfig.get_path("stdlib") + "/"
_SITE = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_MOST_FRAMES = 30


def report(error: BaseException, *, show_traceback: bool) -> int:
    """Print an error to stderr; the exit code: the error's own, or 1."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if show_traceback:
        sys.stderr.write("".join(traceback.format_exception(error)))
    message = _message(error)
    if message is None:
        message = _unexpected(error, show_traceback)
    sys.stderr.write("error: " + message.replace("\n", "\n  ") + "\n")
    if not show_traceback:
        sys.stderr.write(_users_part(error))
        sys.stderr.writelines(f"{note}\n" for note in getattr(error, "__notes__", ()))
    return error.exit_code if isinstance(error, DovetailError) else 1


def _message(error: BaseException) -> str | None:
    """What to tell about an error that a person can act on; None for any other."""
    if isinstance(error, DovetailError):
        return str(error)
    if type(error).__name__ in _MEMORY or "can't allocate memory" in str(error):
        return (
            f"out of memory: {_first_line(error)}; lower --max-tokens-per-gpu "
            "(TOML: batch.max_tokens_per_gpu) or --engine-memory-gb (TOML: engine.engine_memory_gb)"
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" writing {error.filename}" if error.filename else ""
        return (
            f"no space left{where}; free some, or write elsewhere with --run-dir "
            "(TOML: observe.run_dir) and --save (TOML: checkpoint.save)"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


def _users_part(error: BaseException) -> str:
    """The traceback of what a user's function raised, from its own first line on."""
    cause = error.__cause__ if isinstance(error, _OF_USERS_CODE) else None
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames = traceback.extract_tb(cause.__traceback__)
        users = [i for i, frame in enumerate(frames) if _is_users(frame.filename)]
        if users and not isinstance(cause, DovetailError):
            shown = traceback.format_list(frames[users[0] :][-_MOST_FRAMES:])
            said = traceback.format_exception_only(cause)
            return "".join(["in your code (most recent call last):\n", *shown, *said])
        cause = cause.__cause__
    return ""


def _is_users(file: str) -> bool:
    if file.startswith(_OURS):
        return False
    return file.startswith(_SITE) or not file.startswith(_STANDARD)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _unexpected(error: BaseException, show_traceback: bool) -> str:
    line = f"unexpected {type(error).__name__}: {_first_line(error)}"
    if show_traceback:
        return line
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dovetail-error-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:  # Nowhere to write: the screen is the last place left.
        return f"{line}\n{text}"
    return f"{line}\nthe traceback is in {file.name}; --traceback shows it here"
