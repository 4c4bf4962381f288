"""Hooks of prompts and of the buffer."""

from __future__ import annotations

from dovetail.hooks.rows.families import CALLED, DOCUMENTED, FOREIGN
from dovetail.hooks.spec import CallForm, HookSpec, Kind

DATA: tuple[HookSpec, ...] = (
    HookSpec(
        slot="data_source",
        stage="data",
        process="rollout",
        kind=Kind.FACTORY,
        forms=(
            CallForm(
                families=("native",),
                positional=("call",),
                makes=("get_samples", "add_samples"),
            ),
            CallForm(
                families=FOREIGN,
                positional=("args",),
                makes=("get_samples", "add_samples", "save", "load"),
            ),
        ),
        default="dovetail.data.source.PromptDataSource",
        returns=(
            "an object with get_samples(n), add_samples(groups), and state_dict() with "
            "load_state_dict(state), or save(rollout_id) with load(rollout_id)"
        ),
        when="once, before the first step; what it makes is asked for prompts from then on",
        doc=(
            "A class or a function that makes the source of prompts. `get_samples(n)` gives n "
            "groups (lists) of n_samples_per_prompt Samples with group_index and index set; "
            "`add_samples(groups)` takes back what was not used. State goes into the checkpoint "
            "through state_dict and load_state_dict; a source with save and load is told the "
            "rollout id and keeps files of its own. `call` (a `DataSourceCall`) has args, "
            "tokenizer, config (the data section) and `default`, which makes the built-in source."
        ),
        example=(
            "class Easiest:\n"
            "    def __init__(self, call):\n"
            "        self.inner = call.default()\n"
            "\n"
            "    def get_samples(self, num_samples):\n"
            "        groups = self.inner.get_samples(2 * num_samples)\n"
            "        groups.sort(key=lambda group: len(group[0].prompt))\n"
            "        self.inner.add_samples(groups[num_samples:])\n"
            "        return groups[:num_samples]\n"
            "\n"
            "    def add_samples(self, samples):\n"
            "        self.inner.add_samples(samples)\n"
            "\n"
            "    def state_dict(self):\n"
            "        return self.inner.state_dict()\n"
            "\n"
            "    def load_state_dict(self, state):\n"
            "        self.inner.load_state_dict(state)\n"
        ),
        example_name="Easiest",
        runs_async=False,
    ),
    HookSpec(
        slot="buffer_filter",
        stage="data",
        process="rollout",
        forms=(
            CallForm(families=("native",), positional=("buffer", "num_samples")),
            CallForm(
                families=FOREIGN,
                positional=("args", "rollout_id", "buffer", "num_samples"),
                origin=CALLED,
            ),
            CallForm(families=("slime", "miles"), positional=("samples",), origin=DOCUMENTED),
            CallForm(
                families=("slime", "miles"), positional=("args", "samples"), origin=DOCUMENTED
            ),
        ),
        default="the oldest groups",
        returns="a list of at most num_samples groups",
        when="when prompts are needed and groups wait in the buffer (partial rollout)",
        doc=(
            "Takes groups out of `buffer` (in place) and returns them; new prompts make up what "
            "is missing. The documented forms get no count: what they return replaces the "
            "buffer, and its first groups are served; what they leave out is gone. rollout_id "
            "is always None."
        ),
        example=(
            "def longest_first(buffer, num_samples):\n"
            "    buffer.sort(key=lambda group: -sum(s.response_length for s in group))\n"
            "    taken = buffer[:num_samples]\n"
            "    del buffer[:num_samples]\n"
            "    return taken\n"
        ),
        example_name="longest_first",
        runs_async=False,
        registered={"pop_first": "dovetail.data.source:pop_first"},
    ),
)
