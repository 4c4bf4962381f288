"""Data sources of the user's, behind our port: `save` and `load` keep their own files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from dovetail.hooks.invoke import Invoke
from dovetail.hooks.spec import HookSpec
from dovetail.types import Group, HookRunError, Sample


class UserSource:
    """What the user's class or function made, as a DataSource; other attributes are its own.

    `state_dict` and `load_state_dict` are the source's where it has them. Otherwise its state is
    where `save(rollout_id)` puts it: the run calls `save` beside each checkpoint and `load` when it
    resumes, and `has_own_files` says so.
    """

    def __init__(self, spec: HookSpec, invoke: Invoke, source: Any) -> None:
        self._spec, self._invoke, self.source = spec, invoke, source
        self.has_own_files = not hasattr(source, "state_dict")

    def get_samples(self, num_samples: int) -> list[Group]:
        """Groups of samples, as the user's source makes them."""
        got = self._call("get_samples", num_samples)
        groups = list(got) if isinstance(got, list | tuple) else None
        if groups is None or not all(_is_group(group) for group in groups):
            shown = repr(got)
            raise HookRunError(
                f"{self._spec.where}: {self._invoke.name}.get_samples({num_samples}) gave back a "
                f"{type(got).__name__}: {shown[:117] + '...' if len(shown) > 120 else shown}. "
                "Expected: a list of groups, each a list of Samples"
            )
        return groups

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups back."""
        self._call("add_samples", samples)

    def state_dict(self) -> dict[str, Any]:
        """The source's own, or a note that it keeps files of its own."""
        return {"foreign": True} if self.has_own_files else self._call("state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; nothing for a source with files of its own."""
        if not self.has_own_files:
            self._call("load_state_dict", state)

    def save(self, rollout_id: int) -> None:
        """Let a source with files of its own write them."""
        if hasattr(self.source, "save"):
            self._call("save", rollout_id)

    def load(self, rollout_id: int | None = None) -> None:
        """Let a source with files of its own read them."""
        if hasattr(self.source, "load"):
            self._call("load", rollout_id)

    def snapshot(self) -> dict[str, Any]:
        """Its attributes as they are now; args, tokenizers and what can't be copied are shared.

        Samples are copied too, so that putting the snapshot back undoes what happened to them.
        """
        own = vars(self.source) if hasattr(self.source, "__dict__") else {}
        memory = self._shared(own)
        return {name: _copied(value, memory) for name, value in own.items()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Make it again what it was at `snapshot`."""
        if hasattr(self.source, "__dict__"):
            self.source.__dict__.clear()
            memory = self._shared(snapshot)
            self.source.__dict__.update({k: _copied(v, memory) for k, v in snapshot.items()})

    def _shared(self, attributes: Mapping[str, Any]) -> dict[int, Any]:
        """What a copy keeps as it is, by id: the run tells args more as it goes, and a tokenizer
        takes longer to copy than a step's samples."""
        kept = [v for v in attributes.values() if hasattr(v, "encode") and hasattr(v, "decode")]
        return {id(value): value for value in (self._invoke.args, *kept)}

    def __len__(self) -> int:
        return len(self.source)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def _call(self, method: str, *values: Any) -> Any:
        return self._invoke.method(self.source, method, *values)


class SamplesAccess:
    """A data source that can also be called as its `get_samples`: two frameworks differ in which of
    them they hand over."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __call__(self, num_samples: int) -> list[Group]:
        got: list[Group] = self._source.get_samples(num_samples)
        return got

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __bool__(self) -> bool:
        return True


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, list | tuple)
        and bool(group)
        and all(isinstance(sample, Sample) for sample in group)
    )


def _copied(value: Any, memory: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memory)
    # Locks, clients, open files: whatever refuses stays as it is.
    except Exception:
        return value
