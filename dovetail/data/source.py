"""The default data source: prompts in epoch order, and a buffer of groups that came back.

    prompts --epoch order(seed, epoch)--> new groups --+
                                                       +--> get_samples
    add_samples --> buffer --buffer filter (first n) --+

What came back is served first. The state is position, counters and buffer; the order of an epoch is
computed again from (seed, epoch), so a restored source goes on like one that never stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

from dovetail.data.order import epoch_order
from dovetail.data.prompt import PromptSet
from dovetail.data.state import groups_from_json, groups_to_json
from dovetail.types.errors import CheckpointError, DataError, HookRunError
from dovetail.types.sample import Group, PrefixCacheInfo, Sample, SpecInfo

BufferFilter = Callable[[list[Group], int], list[Group]]
"""`(buffer, n) -> at most n groups`, taken out of `buffer` in place."""

_STATE_VERSION = 1
_SHARED_TYPES = (type(None), bool, int, float, str, bytes, Sample.Status)
_COUNTERS = (SpecInfo, PrefixCacheInfo)


def pop_first(buffer: list[Group], num_groups: int) -> list[Group]:
    """The default buffer filter: the oldest groups."""
    taken = buffer[:num_groups]
    del buffer[:num_groups]
    return taken


class PromptDataSource:
    """Groups of `n_samples_per_prompt` samples of each prompt, epoch after epoch; never runs dry.

    `samples` are prototypes: they are copied, never handed out. Indices count on over the run.

    Example:
        >>> source = PromptDataSource([Sample(prompt="1+1=", tokens=[5])], n_samples_per_prompt=2)
        >>> [s.index for s in source.get_samples(1)[0]], len(source)
        ([0, 1], 1)
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        n_samples_per_prompt: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        buffer_filter: BufferFilter | None = None,
        num_dropped: int = 0,
        longest_prompt: int | None = None,
    ) -> None:
        if not len(samples):
            raise DataError("a data source needs at least one prompt")
        self.num_dropped = num_dropped
        """Over-long prompts that were left out when the data was read."""
        self.longest_prompt = longest_prompt
        """Tokens of the longest prompt, where known."""
        self.epoch = 0
        self._prototypes = samples
        self._group_size = n_samples_per_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._filter = buffer_filter or pop_first
        self._position = 0
        self._next_group_index = 0
        self._next_index = 0
        self._buffer: list[Group] = []
        self._order = self._order_of(0)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        """Prompts per epoch."""
        return len(self._prototypes)

    def get_buffer_length(self) -> int:
        """Groups that came back and wait to be served again."""
        return len(self._buffer)

    def get_samples(self, num_samples: int) -> list[Group]:
        """Exactly `num_samples` groups: from the buffer first, then new prompts.

        Raises:
            HookRunError: the buffer filter returned something else than at most that many groups.
        """
        groups = self._from_buffer(num_samples)
        groups.extend(self._new_group() for _ in range(num_samples - len(groups)))
        return groups

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups back behind those that wait already.

        Raises:
            HookRunError: a group has not `n_samples_per_prompt` samples.
        """
        for group in samples:
            self._check_group(group)
        self._buffer.extend(samples)

    def state_dict(self) -> dict[str, Any]:
        """Position, counters and buffer, JSON-able.

        Raises:
            CheckpointError: a sample in the buffer holds an object without an exact JSON form.
        """
        return {
            "version": _STATE_VERSION,
            **self._identity(),
            "n_samples_per_prompt": self._group_size,
            "epoch": self.epoch,
            "position": self._position,
            "next_group_index": self._next_group_index,
            "next_index": self._next_index,
            **groups_to_json(self._buffer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Nothing changes if it can't.

        Raises:
            CheckpointError: the state is of other data, another order or group size, or is damaged.
        """
        self._check_identity(state)
        try:
            buffer = groups_from_json(state)
            numbers = [
                int(state[name]) for name in ("epoch", "position", "next_group_index", "next_index")
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state of the data source is damaged: {error!r}") from error
        sizes = {len(group) for group in buffer} - {self._group_size}
        if sizes:
            raise CheckpointError(
                f"the checkpoint's buffer holds groups of {min(sizes)} samples, this run wants "
                f"{self._group_size}; resume with --n-samples-per-prompt {min(sizes)} "
                "(TOML: rollout.n_samples_per_prompt)"
            )
        if not (0 <= numbers[1] <= len(self) and min(numbers) >= 0):
            raise CheckpointError(f"the state of the data source is damaged: position {numbers}")
        self.epoch, self._position, self._next_group_index, self._next_index = numbers
        self._buffer = buffer
        self._order = self._order_of(self.epoch)

    def _from_buffer(self, num_groups: int) -> list[Group]:
        if not self._buffer or num_groups <= 0:
            return []
        taken = self._filter(self._buffer, num_groups)
        if not isinstance(taken, list) or len(taken) > num_groups:
            got = f"{len(taken)} groups" if isinstance(taken, list) else f"a {type(taken).__name__}"
            raise HookRunError(
                f"the buffer filter returned {got}, expected a list of at most {num_groups} groups "
                "(--buffer-filter-path, TOML: hooks.buffer_filter_path)"
            )
        for group in taken:
            self._check_group(group)
        # A filter that forgets to take out what it returns would have it served twice.
        served = {id(group) for group in taken}
        self._buffer[:] = [group for group in self._buffer if id(group) not in served]
        return list(taken)

    def _new_group(self) -> Group:
        if self._position == len(self._order):
            self.epoch += 1
            self._position = 0
            self._order = self._order_of(self.epoch)
        prototype = self._prototypes[self._order[self._position]]
        group = [fresh_copy(prototype) for _ in range(self._group_size)]
        for offset, sample in enumerate(group):
            sample.group_index = self._next_group_index
            sample.index = self._next_index + offset
        self._position += 1
        self._next_group_index += 1
        self._next_index += self._group_size
        return group

    def _order_of(self, epoch: int) -> list[int]:
        return epoch_order(len(self._prototypes), self._seed, epoch, self._shuffle)

    def _check_group(self, group: Any) -> None:
        if isinstance(group, list) and all(isinstance(sample, Sample) for sample in group):
            if len(group) == self._group_size:
                return
            got = f"a group of {len(group)} samples"
        else:
            got = f"{type(group).__name__} {group!r:.80}"
        raise HookRunError(
            f"the buffer takes groups of {self._group_size} samples "
            f"(--n-samples-per-prompt, TOML: rollout.n_samples_per_prompt), got {got}"
        )

    def _identity(self) -> dict[str, Any]:
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._prototypes)
        return {
            "num_prompts": len(self._prototypes),
            "fingerprint": self._fingerprint,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"the state of the data source has version {state.get('version')!r}, "
                f"expected {_STATE_VERSION}"
            )
        ours = self._identity()
        wrong = [name for name in ours if state.get(name) != ours[name]]
        if wrong == ["seed"] and not self._shuffle:
            return  # File order does not depend on the seed.
        cures = {
            "num_prompts": "resume with the same --prompt-data (TOML: data.prompt_data) and limits",
            "fingerprint": "the prompts themselves differ; resume with the same --prompt-data "
            "(TOML: data.prompt_data), template and columns",
            "shuffle": "resume with the same --rollout-shuffle (TOML: data.rollout_shuffle)",
            "seed": "resume with the same --rollout-seed (TOML: data.rollout_seed)",
        }
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"the checkpoint was written with other data: {name} {state.get(name)!r} there, "
                f"{ours[name]!r} here; {cures[name]}, or start without --load"
            )


def fresh_copy(prototype: Sample) -> Sample:
    """A sample of its own: nothing that may be written to is shared."""
    twin = copy(prototype)
    for name, value in vars(twin).items():
        if isinstance(value, _SHARED_TYPES):
            continue
        # A sample is mostly these, and a deep copy of each costs more than a short response.
        if name == "tokens":
            twin.tokens = list(value)
        elif type(value) in (list, dict) and not value:
            setattr(twin, name, type(value)())
        elif type(value) in _COUNTERS:
            setattr(twin, name, type(value)(**vars(value)))
        else:
            setattr(twin, name, deepcopy(value))
    return twin


def _fingerprint(samples: Sequence[Sample]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for facts in _facts(samples):
        digest.update(json.dumps(facts, sort_keys=True, default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _facts(samples: Sequence[Sample]) -> Iterator[list[Any]]:
    if isinstance(samples, PromptSet):
        # Making a sample of a prompt opens its images.
        return samples.facts()
    each = (samples[i] for i in range(len(samples)))
    return ([sample.prompt, sample.label, sample.metadata] for sample in each)
