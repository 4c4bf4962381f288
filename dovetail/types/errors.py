"""Errors that a user can act on. One root; each is also a standard class; each survives pickling.

A message says what is wrong, what was got, what was expected, and the cure by flag and TOML key.
`exit_code` is what the command line leaves with: 2 for a mistake in how the run was asked for, 1
for a run that failed.
"""

from __future__ import annotations


class DovetailError(Exception):
    """Root of every error raised on purpose by this package."""

    exit_code = 1


class UsageError(DovetailError, ValueError):
    """The run was asked for wrongly: a flag, a file, a combination. Nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value is unknown, of the wrong type, out of bounds or impossible beside
    another."""


class DataError(UsageError):
    """A data file is missing or malformed; the message names file and line."""


class HookError(UsageError):
    """A user's function can't be found, or does not match any call form of its slot."""


class HookRunError(DovetailError, RuntimeError):
    """A user's function raised, or gave back something of a wrong shape, during the run."""


class MissingExtraError(UsageError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class CheckpointError(DovetailError, OSError):
    """A checkpoint can't be written or read, and no earlier good one could take its place."""


class EngineError(DovetailError, RuntimeError):
    """The engine failed while generating."""


class EngineGoneError(EngineError):
    """An engine can't be reached, or broke off: another one may answer the same request."""


class BrokenUpdateError(EngineError):
    """An update of weights broke off in the middle, without any fault of this engine: it answers
    nothing until it has been given all of a version."""


class WeightMismatchError(EngineError):
    """An engine holds other weights than those that it was sent."""


class EngineBusyError(EngineError):
    """Every place in the queue before the engines is taken; later there may be one."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class EngineTimeoutError(EngineError, TimeoutError):
    """No answer within the time that a request has."""


class RequestRefusedError(EngineError, ValueError):
    """The request itself is wrong: no engine of this kind answers it, however often it is asked."""


class RequestTooLongError(RequestRefusedError):
    """A request can never fit the engine's memory or context; the message has the numbers."""


class RolloutError(DovetailError, RuntimeError):
    """A step can't be filled: all groups were dropped or failed, or the source ran dry."""


class RewardError(DovetailError, RuntimeError):
    """A reward function failed more often than the run allows."""


class TrainError(DovetailError, RuntimeError):
    """Training can't go on, e.g. too many non-finite gradients in a row."""


class TrainerLostError(TrainError):
    """A process of the trainer is gone: it may be started anew from the last checkpoint."""
