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
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, sys
if util.find_spec(sys.argv[1]) is None:
    sys.exit(1)
for name in (sys.argv[1], sys.argv[1] + "-cpu"):
    try:
        print(metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""


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
        if name.startswith("no_") and isinstance(value, bool) and "." not in name:
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
    head, dot, key = name.partition(".")
    if dot and value is not None:
        # A key of a table that vLLM puts together; its keys are names of Python.
        word = value if isinstance(value, str) else orjson.dumps(value).decode()
        return [f"--{head.replace('_', '-')}.{key}={word}"]
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
def require_module(python: str, module: str, name: str) -> str | None:
    """The version of an engine that a Python has; None where it does not tell. One without the
    engine is refused.

    Args:
        python: the interpreter.
        module: of the engine, also its name for `--rollout-engine`.
        name: as messages write it.

    Raises:
        MissingExtraError: it has no such module, or can't be run.
    """
    try:
        found = subprocess.run([python, "-c", _PROBE, module], check=False, capture_output=True)
    except OSError as error:
        raise MissingExtraError(
            f"--rollout-engine {module}: {python} can't be run ({error.strerror}); give the Python "
            f"that has {name}: --engine-python /path/to/python (TOML: engine.engine_python)"
        ) from error
    if found.returncode == 0:
        return found.stdout.decode(errors="replace").strip() or None
    own = "the run's own Python" if python == sys.executable else python
    raise MissingExtraError(
        f"--rollout-engine {module}: {own} has no {name}. Install it in an environment of its own, "
        "because it pins its torch, and give that one's Python: --engine-python "
        "/path/to/venv/bin/python (TOML: engine.engine_python); docs/engines.md says how"
    )
