"""Which settings vLLM and SGLang have: a misspelt one is told before anything loads, not by a
server a minute later. The lists beside the launchers are made by `tests/engine_flags.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

from dovetail.types.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KnownFlags:
    """The flags of one version of an engine."""

    engine: str
    """`vllm` or `sglang`."""
    title: str
    """As messages write it."""
    version: str
    names: frozenset[str]
    """Without `--`, with dashes; the contraries of switches too."""
    dotted: bool
    """Whether `--name.key` sets a key of a setting that is a table."""

    def has(self, name: str, value: Any = None) -> bool:
        """Whether the server's parser takes this one: by its name, or a beginning that only one
        name has.

        Args:
            name: with underscores.
            value: False also asks for `no_name`.
        """
        head = _dashed(name.partition(".")[0] if self.dotted else name)
        wanted = [head, f"no-{head}"] if value is False else [head]
        return any(
            one in self.names or sum(known.startswith(one) for known in self.names) == 1
            for one in wanted
        )

    def has_contrary(self, name: str) -> bool:
        """Whether False is to be written as `--no-name`: unknown settings are taken to have one
        where vLLM's do."""
        head = _dashed(name)
        return f"no-{head}" in self.names or (self.dotted and head not in self.names)

    def check(self, users: Mapping[str, Any], installed: str | None) -> tuple[str, ...]:
        """Compare what the user says with the list.

        Args:
            users: values by names with underscores.
            installed: the version on this machine; None: not known.

        Returns:
            What is to be told of names that another version than the list's may have.

        Raises:
            ConfigError: a name that the installed version, the list's, does not have; all of
                them, one a line.
        """
        strange = [name for name, value in users.items() if not self.has(name, value)]
        said = [self._said(name, installed) for name in strange]
        if said and _plain(installed) == self.version:
            raise ConfigError("\n".join(said))
        return tuple(said)

    def _said(self, name: str, installed: str | None) -> str:
        head, dot, rest = name.partition(".") if self.dotted else (name, "", "")
        near = get_close_matches(_dashed(head), sorted(self.names), n=1)
        if near:
            hint = f"did you mean --{self.engine}-{near[0]}{dot}{rest}?"
        else:
            hint = f"no name of its comes near; {self.title}'s own --help lists them all"
        flag = f"--{self.engine}-{_dashed(name)} (TOML: {self.engine}.{name})"
        if _plain(installed) == self.version:
            return f"{flag}: {self.title} {self.version} has no such setting; {hint}"
        other = f"{installed} is installed" if installed else "which one runs here is not known"
        return (
            f"{flag} is handed through, but {self.title} {self.version} has no such setting "
            f"({other}); {hint}"
        )


@cache
def known_flags(engine: str) -> KnownFlags:
    """The list of `vllm` or `sglang`."""
    file = resources.files(f"dovetail.engines.{engine}").joinpath("flags.txt")
    first, *names = file.read_text(encoding="utf-8").splitlines()
    version = first.split()[2].rstrip(",")
    title = {"vllm": "vLLM", "sglang": "SGLang"}[engine]
    return KnownFlags(engine, title, version, frozenset(names), dotted=engine == "vllm")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _plain(version: str | None) -> str | None:
    """Without what a build adds: `0.32.0+cu129`."""
    return None if version is None else version.partition("+")[0]
