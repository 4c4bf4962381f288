"""The command line of somebody else's server: the run's own flags, and those that the user hands
through."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import orjson

from dovetail.types.errors import ConfigError, MissingExtraError

_WORDS = {"true": True, "false": False}


def chosen(
    prefix: str, passthrough: Mapping[str, Any], runs_own: Mapping[str, str]
) -> dict[str, Any]:
    """What the user says, by names with underscores; `no_name` as the contrary of `name`.

    Args:
        prefix: of the user's flags, `vllm` or `sglang`.
        passthrough: without prefix; `true` and `false` out of a flag count as truth values.
        runs_own: settings that the run sets itself, with what to use in their place.

    Raises:
        ConfigError: there is one of `runs_own`.
    """
    found = {}
    for written_name, value in passthrough.items():
        name = written_name.replace("-", "_")
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        if name.startswith("no_") and isinstance(value, bool):
            name, value = name.removeprefix("no_"), not value
        if name in runs_own:
            instead = runs_own[name]
            if instead.startswith("nothing: "):
                cure = f"leave it out: {instead.removeprefix('nothing: ')}"
            else:
                cure = f"use {instead} instead"
            raise ConfigError(
                f"--{prefix}-{name.replace('_', '-')} is set by the run itself; {cure}"
            )
        found[name] = value
    return found


def written(name: str, value: Any, *, has_no: bool) -> list[str]:
    """A setting as words of a command line. A list has all its values after the name, a table is
    JSON, None is nothing.

    Args:
        has_no: whether False is `--no-name`; else it is nothing.
    """
    flag = name.replace("_", "-")
    if value is None or (value is False and not has_no):
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *(_text(one) for one in value)]
    # One word, so that a value may begin with a dash: `--max-logprobs=-1`.
    return [f"--{flag}={_text(value)}"]


def _text(value: Any) -> str:
    return orjson.dumps(value).decode() if isinstance(value, dict) else str(value)


@cache
def require_module(python: str, module: str, name: str) -> None:
    """Refuse a Python without an engine.

    Args:
        python: the interpreter.
        module: of the engine, also its name for `--rollout-engine`.
        name: as messages write it.

    Raises:
        MissingExtraError: it has no such module, or can't be run.
    """
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    try:
        found = subprocess.run([python, "-c", probe], check=False, capture_output=True)
    except OSError as error:
        raise MissingExtraError(
            f"--rollout-engine {module}: {python} can't be run ({error.strerror}); give the Python "
            f"that has {name}: --engine-python /path/to/python (TOML: engine.engine_python)"
        ) from error
    if found.returncode == 0:
        return
    own = "the run's own Python" if python == sys.executable else python
    raise MissingExtraError(
        f"--rollout-engine {module}: {own} has no {name}. Install it in an environment of its own, "
        "because it pins its torch, and give that one's Python: --engine-python "
        "/path/to/venv/bin/python (TOML: engine.engine_python); docs/engines.md says how"
    )
