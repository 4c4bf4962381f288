"""A wish to end comes once, also where the system says it twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from dovetail.run.interrupt import Interrupt

PROGRAM = """
import os, signal, time
from dovetail.run.interrupt import Interrupt
with Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("saving", flush=True)
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never said")
"""


def test_one_signal_that_arrives_twice_lets_the_run_save():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.requested and interrupt.exit_code == 130


def test_a_second_signal_later_leaves_at_once():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == "saving\n"
    assert done.stderr == "\nSIGINT: saving, then leaving; once more leaves at once\n"
