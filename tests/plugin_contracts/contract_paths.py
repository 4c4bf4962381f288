"""Which functions the contract tests try: those you point at, else the built-in and sample ones.

    python test_plugin_rollout_contracts.py --rollout-function-path my.mod.fn
    VIME_CONTRACT_ROLLOUT_FUNCTION_PATH=my.mod.fn python -m pytest test_plugin_rollout_contracts.py

An environment variable is `<PREFIX>_CONTRACT_<FLAG>`, the flag in capitals and without dashes; the
prefix is DOVETAIL, SLIME, VIME or MILES, and the first that is set counts. What a path may look
like is what the flag takes in a training run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pytest

from dovetail.hooks import HOOKS, HookSpec, spec_of

PREFIXES = ("DOVETAIL", "SLIME", "VIME", "MILES")
RUN_FLAGS = "DOVETAIL_CONTRACT_RUN_FLAGS"
"""Flags of a training run that your function depends on, e.g. `--group-rm`."""
PLUGINS = Path(__file__).parent / "plugins"


def variable(spec: HookSpec, prefix: str = "DOVETAIL") -> str:
    """The environment variable that points at a function of this hook."""
    return f"{prefix}_CONTRACT_{spec.leaf.upper()}"


def pointed_at(slot: str) -> str | None:
    """The path that the environment has for a hook."""
    found = (os.environ.get(variable(spec_of(slot), prefix)) for prefix in PREFIXES)
    return next((path for path in found if path), None)


def misspelt() -> list[str]:
    """What is wrong with variables that look like ours and are none."""
    names = [variable(spec, prefix) for spec in HOOKS for prefix in PREFIXES]
    ours = re.compile(f"({'|'.join(PREFIXES)})_CONTRACT_")
    return [
        f"unknown variable {name}{_meant(name, names)}"
        for name in os.environ
        if ours.match(name) and name not in (*names, RUN_FLAGS)
    ]


def _meant(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def run_flags() -> list[str]:
    """Flags of the run whose configuration the functions get as `args`."""
    return shlex.split(os.environ.get(RUN_FLAGS, ""))


def targets(slots: Sequence[str], samples: Mapping[str, Sequence[str]], slot: str) -> list[str]:
    """The paths to try in `slot`.

    Once a path is given for any hook of the file (`slots`), the given ones are all that is tried.
    """
    if any(pointed_at(one) for one in slots):
        path = pointed_at(slot)
        return [path] if path else []
    return [*spec_of(slot).registered, *(_located(path) for path in samples.get(slot, ()))]


def _located(path: str) -> str:
    """A sample plugin beside this file; a dotted path is left as it is."""
    return str(PLUGINS / path) if ".py:" in path else path


def run_as_script(file: str, slots: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """Run the tests of one file on the functions that its flags name."""
    parser = argparse.ArgumentParser(
        prog=f"python {Path(file).name}",
        description="Test functions of yours against the contracts of their hooks.",
        epilog="Further arguments go to pytest. Environment variables: "
        f"{', '.join(f'{prefix}_CONTRACT_<FLAG>' for prefix in PREFIXES)}.",
        allow_abbrev=False,
    )
    for slot in slots:
        spec = spec_of(slot)
        parser.add_argument(spec.flag, dest=slot, metavar="PATH", help=spec.summary)
    parser.add_argument(
        "--run-flags",
        metavar="'FLAGS'",
        help="flags of the training run that your functions need: they see its configuration as "
        "args, its --prompt-data and, with --hf-checkpoint, its tokenizer",
    )
    options, rest = parser.parse_known_args(argv)
    for flag in (one.partition("=")[0] for one in rest):
        if re.fullmatch(r"--[\w-]+-paths?", flag):
            mine = [spec_of(slot).flag for slot in slots]
            parser.error(f"no hook of this file: {flag}{_meant(flag, mine)}")
    for slot in slots:
        path = getattr(options, slot)
        if path is not None:
            os.environ[variable(spec_of(slot))] = path
    if options.run_flags is not None:
        os.environ[RUN_FLAGS] = options.run_flags
    return int(pytest.main([file, *rest]))
