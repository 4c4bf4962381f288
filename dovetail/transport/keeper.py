"""A small program between a run and a process that the run starts, so that nothing of it outlives
the run, even one that is killed.

    run --starts--> keeper --starts--> command --starts--> ...

    python -I -S keeper.py PID_OF_RUN [--remove DIR]... [-- COMMAND...]

It waits until the run or the command ends, whichever is first. Then every process below it is
killed, also those whose own parent is gone; if it was the run that ended, the directories are
removed. Its exit code is that of the command, 128 + n for a signal n. SIGTERM is handed on to the
command, SIGUSR1 kills everything at once. Without a command it waits for the run alone.

Only the standard library, so that it starts in milliseconds and needs little memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from types import FrameType

_SET_DEATH_SIGNAL, _ADOPT_ORPHANS = 1, 36
"""Options of prctl(2)."""
_LOOK_EVERY_MS = 100
"""Where there are no file descriptors of processes."""
_LOOK_OFTEN_S = 0.005
_GRACE_S = 1.0
"""For what tidies up after the others."""
_NOT_STARTED = 127


def main(arguments: list[str]) -> int:
    """See the module; the exit code."""
    run, directories, command = _parsed(arguments)
    _prctl(_ADOPT_ORPHANS, 1)
    kept = _Kept(run)
    kept.install_handlers()
    if command and kept.run_lives():
        kept.start(command)
    kept.wait()
    code = kept.end()
    if not kept.run_lives():
        _remove(directories)
    return code


class _Kept:
    """The run above, and the command below."""

    def __init__(self, run: int) -> None:
        self._run, self._command, self._status = run, 0, 0
        self._ends_now = self._ended = False
        # Whatever happens from here on, the run can't be confused with a later process of its id.
        self._poll = select.poll()
        self._exact = self._watch(run)
        # A signal between a look at the flag and the poll would wait for the next event.
        self._woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._woken, select.POLLIN)
        signal.set_wakeup_fd(waker)

    def install_handlers(self) -> None:
        signal.signal(signal.SIGTERM, self._hand_on)
        signal.signal(signal.SIGUSR1, self._end_now)
        # Only to be woken by it.
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        # A terminal's Ctrl-C is for the run, which ends us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run_lives(self) -> bool:
        return os.getppid() == self._run

    def start(self, command: list[str]) -> None:
        self._command = os.fork()
        if self._command == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # For the case that somebody kills this keeper.
            _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
            try:
                os.execvp(command[0], command)
            except OSError as error:
                sys.stderr.write(f"{command[0]} can't be started: {error.strerror}\n")
                sys.stderr.flush()
                os._exit(_NOT_STARTED)
        self._exact = self._watch(self._command) and self._exact

    def wait(self) -> None:
        while self.run_lives() and not self._ends_now and not self._command_ended():
            self._poll.poll(None if self._exact else _LOOK_EVERY_MS)
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 64)

    def end(self) -> int:
        """Kill what is left below; the exit code."""
        if not self._command:
            return 0
        patient_until = time.monotonic() + _GRACE_S
        while True:
            patient = time.monotonic() < patient_until
            for pid in [one for one in _children() if not (patient and _tidies(one))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            self._note(pid, status)
            if not pid:
                time.sleep(_LOOK_OFTEN_S)
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else 128 - code

    def _watch(self, pid: int) -> bool:
        """Be woken by the end of this process; whether that works here."""
        try:
            self._poll.register(os.pidfd_open(pid), select.POLLIN)
        except (AttributeError, OSError):
            return False
        return True

    def _command_ended(self) -> bool:
        """Look who ended: also adopted processes, which would stay zombies otherwise."""
        while not self._ended:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            self._note(pid, status)
        return self._ended

    def _note(self, pid: int, status: int) -> None:
        if pid == self._command:
            self._status, self._ended = status, True

    def _hand_on(self, signum: int, frame: FrameType | None) -> None:
        if not self._command or self._ended:
            self._ends_now = True
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._command, signal.SIGTERM)
            # One that was stopped would never come to it.
            os.kill(self._command, signal.SIGCONT)

    def _end_now(self, signum: int, frame: FrameType | None) -> None:
        self._ends_now = True


def _parsed(arguments: list[str]) -> tuple[int, list[str], list[str]]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = arguments[1:end], arguments[end + 1 :]
    return int(arguments[0]), [path for path in options if path != "--remove"], command


def _prctl(option: int, value: int) -> None:
    # Elsewhere than on Linux the looks at the run have to do.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    own = os.getpid()
    try:
        with open(f"/proc/{own}/task/{own}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        # Everything of our group, ourselves too: then there is nobody left to wait.
        os.killpg(0, signal.SIGKILL)
        raise


def _tidies(pid: int) -> bool:
    """Whether it is Python's own process that removes what others leave in shared memory. It ends
    by itself when they have."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


def _remove(directories: list[str]) -> None:
    import shutil

    for path in directories:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
