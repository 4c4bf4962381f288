"""The log: everything in the file, warnings on the terminal, logging as before afterwards."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

from dovetail.observe.log import open_log, warn_once

log = logging.getLogger("dovetail.some.part")


def test_the_file_has_everything_and_the_terminal_the_warnings(tmp_path, capfd):
    with open_log(tmp_path / "log.txt"):
        log.info("informed %d", 1)
        log.warning("warned")
        try:
            raise ValueError("inner")
        except ValueError:
            log.exception("failed")
        warnings.warn("from Python", stacklevel=1)
    assert capfd.readouterr().err == "warning: warned\nerror: failed: ValueError: inner\n"
    text = (tmp_path / "log.txt").read_text()
    for words in ("INFO    dovetail.some.part: informed 1", "Traceback", "from Python"):
        assert words in text


def test_a_second_run_appends_and_logging_is_given_back(tmp_path, capfd):
    root = logging.getLogger("dovetail")
    before = (list(root.handlers), root.level, root.propagate)
    for word in ("first", "second"):
        with open_log(tmp_path / "log.txt"):
            log.info(word)
    assert (list(root.handlers), root.level, root.propagate) == before
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_a_warning_is_given_once_per_run_and_key(capfd):
    for _ in range(2):
        with open_log(None):
            for number in (1, 2):
                warn_once(log, "no effect: %d", number)
                warn_once(log, "each %d", number, key=number)
    assert capfd.readouterr().err == "warning: no effect: 1\nwarning: each 1\nwarning: each 2\n" * 2


def test_nothing_in_observe_imports_torch_or_a_tracker_package():
    code = (
        "import sys, pkgutil, importlib, dovetail.observe as o\n"
        "for m in pkgutil.walk_packages(o.__path__, 'dovetail.observe.'):\n"
        "    importlib.import_module(m.name)\n"
        "heavy = {'torch', 'matplotlib', 'tensorboard', 'wandb', 'transformers', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_lines_that_do_not_fit_on_the_disk_are_lost_in_silence(capfd):
    with open_log(Path("/dev/full")):
        log.info("lost")
        log.warning("warned")
    assert capfd.readouterr().err == "warning: warned\n"
