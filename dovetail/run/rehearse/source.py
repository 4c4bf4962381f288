"""Data sources: a small one of our own for other hooks, and the user's under test."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.config.run import RunConfig
from dovetail.data.source import PromptDataSource
from dovetail.hooks import BoundHook
from dovetail.run.rehearse.samples import prompts
from dovetail.run.rehearse.stage import Stage
from dovetail.run.rehearse.tokenizers import tokenizer_of
from dovetail.run.rehearse.verdict import Fault, NotInRehearsal
from dovetail.types import DataSourceCall, Group, Sample


class FewPrompts:
    """A data source over the few prompts of the rehearsal, round and round."""

    def __init__(self, config: RunConfig, missing: list[str]) -> None:
        self._prototypes, self.made_up = prompts(config, missing)
        self._size = config.rollout.n_samples_per_prompt
        self._numbers, self._indices = itertools.count(), itertools.count()
        self.buffer: list[Group] = []
        self.metadata: dict[str, Any] = {}
        self.epoch_id = self.sample_offset = 0
        self.dataset = self._prototypes

    def __len__(self) -> int:
        return len(self._prototypes)

    def get_samples(self, num_samples: int) -> list[Group]:
        """What came back first, then the prompts in turn."""
        taken, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        return taken + [self._fresh() for _ in range(num_samples - len(taken))]

    def _fresh(self) -> Group:
        number = next(self._numbers)
        prototype = self._prototypes[number % len(self._prototypes)]
        group = [copy.deepcopy(prototype) for _ in range(self._size)]
        for sample in group:
            sample.group_index, sample.index = number, next(self._indices)
        return group

    def add_samples(self, samples: list[Group]) -> None:
        """They are served next."""
        self.buffer += samples

    def get_buffer_length(self) -> int:
        """Groups that came back."""
        return len(self.buffer)

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Kept."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Any]:
        """What was kept."""
        return self.metadata

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept over a rehearsal."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...

    def __call__(self, num_samples: int) -> list[Group]:
        """As `get_samples`: the all-samples hook is handed one object for both."""
        return self.get_samples(num_samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotInRehearsal(f"needs data_source.{name}, which the rehearsal's stand-in lacks")


def data_source(hook: BoundHook, stage: Stage) -> None:
    """Two groups are taken, one is put back, and the state goes out and in again."""
    size = stage.config.rollout.n_samples_per_prompt
    tokenizer = tokenizer_of(stage.config)
    found, stage.made_up = prompts(stage.config, stage.missing)
    for sample in found:
        # State is kept as JSON, which knows plain dicts only.
        sample.metadata = dict(sample.metadata)
    inner = PromptDataSource(found, size)
    call = DataSourceCall(
        args=stage.args, default=lambda: inner, tokenizer=tokenizer, config=stage.config.data
    )
    with tempfile.TemporaryDirectory() as directory:
        # A source with files of its own writes them where the run saves.
        stage.args.save = directory
        _name_rows(stage, found, Path(directory) / "rows.jsonl")
        source = stage.call(hook, call)
        taken = stage.call(source.get_samples, 2)
        _check_groups(taken, 2, size)
        _check_numbers(taken, stage)
        stage.call(source.add_samples, taken[:1])
        again = stage.call(source.get_samples, 1)
        _check_groups(again, 1, size)
        _check_state(source, stage)


def _name_rows(stage: Stage, found: list[Sample], path: Path) -> None:
    """Made-up prompts in a file, for a source that reads `args.prompt_data` and was given none."""
    data = stage.config.data
    if data.prompt_data is not None:
        return
    label_key = data.label_key or "label"
    rows = [{data.input_key: sample.prompt, label_key: sample.label} for sample in found]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stage.args.prompt_data, stage.args.label_key = str(path), label_key


def _check_groups(groups: list[Group], wanted: int, size: int) -> None:
    if len(groups) != wanted:
        raise Fault(f"get_samples({wanted}) gives {len(groups)} groups")
    for group in groups:
        if len(group) != size:
            raise Fault(
                f"get_samples gives a group of {len(group)} samples, expected {size} "
                "(--n-samples-per-prompt, TOML: rollout.n_samples_per_prompt)"
            )
        if not all(sample.prompt or sample.tokens for sample in group):
            raise Fault(
                "get_samples gives a sample with neither prompt nor tokens; set sample.prompt (a "
                "string or a list of messages)"
            )
        if len({id(sample) for sample in group}) != len(group):
            raise Fault("get_samples gives the same Sample several times in one group")


def _check_numbers(groups: list[Group], stage: Stage) -> None:
    samples = [sample for group in groups for sample in group]
    if any(sample.index is None or sample.group_index is None for sample in samples):
        raise Fault(
            "get_samples gives samples without index or group_index; number them as they are made: "
            "sample.index counts samples, sample.group_index groups"
        )
    if len({sample.index for sample in samples}) != len(samples):
        raise Fault("get_samples gives several samples the same index")
    if any(len({sample.group_index for sample in group}) != 1 for group in groups):
        raise Fault("get_samples gives a group whose samples differ in group_index")
    if len({group[0].group_index for group in groups}) != len(groups):
        raise Fault("get_samples gives two groups the same group_index")


def _check_state(source: Any, stage: Stage) -> None:
    if getattr(source, "has_own_files", False):
        stage.call(source.save, 0)
        stage.call(source.load, 0)
        return
    state = stage.call(source.state_dict)
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise Fault(f"state_dict gives what can't be written as JSON: {error}") from error
    if not isinstance(state, dict):
        raise Fault(f"state_dict gives a {type(state).__name__}, expected a dict")
    stage.call(source.load_state_dict, state)
