"""What is measured: the shapes of work, the model, and the settings that both sides share.

Both sides read these numbers and nothing else decides how much work a step is. A shape fixes the
prompts, the groups and the lengths of one GRPO step; `Settings` fixes the algorithm and the
optimizer.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 8192
PAD_ID = 0
EOS_ID = 1
FIRST_WORD_ID = 2
FIRST_LONG_WORD_ID = 7680
"""Words from here on put the model into its long mode, which only words from here on keep it
in."""


@dataclass(frozen=True)
class Shape:
    """One GRPO step: `prompts` groups of `group_size` responses."""

    name: str
    prompts: int
    group_size: int
    prompt_len: int
    """Tokens of every prompt."""
    response_limit: int
    """Most tokens of a response."""
    checkpoint: str
    """`uniform`: no response ends before the limit. `long_tail`: see `checkpoint.py`."""
    long_prompts: int = 0
    """Prompts per step whose responses run to the limit; the others' end by themselves."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.group_size


SHAPES = (
    Shape("short", 4, 8, prompt_len=64, response_limit=64, checkpoint="uniform"),
    Shape(
        "long_tail", 8, 4, prompt_len=64, response_limit=384, checkpoint="long_tail", long_prompts=1
    ),
    Shape("shared_prompt", 2, 16, prompt_len=512, response_limit=64, checkpoint="uniform"),
)
SHORT_RESPONSE_MEAN = 18
"""Mean response of `long_tail` prompts that are not long: the mean of all is 64, a sixth of the
limit."""


@dataclass(frozen=True)
class Settings:
    """Algorithm and optimizer, the same numbers on both sides."""

    learning_rate: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    temperature: float = 1.0
    micro_batch_size: int = 8
    """TRL's default; the other side packs micro-batches by its own default, a budget of tokens."""
    threads: int = 2
    seed: int = 1234


@dataclass(frozen=True)
class Job:
    """One worker's work: a shape in one precision."""

    shape: Shape
    precision: str
    """`default` (the side's own), `float32` or `bfloat16`."""
    steps: int
    """Most steps that will be asked for, warm-up included."""
    directory: str
    """Where the checkpoints, prompts and outputs are."""
    settings: Settings = Settings()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        values: dict[str, Any] = json.loads(text)
        values["shape"] = Shape(**values["shape"])
        values["settings"] = Settings(**values["settings"])
        return Job(**values)

    @property
    def model_path(self) -> Path:
        return Path(self.directory) / "checkpoints" / self.shape.checkpoint

    @property
    def prompts_path(self) -> Path:
        return Path(self.directory) / f"prompts_{self.shape.name}.jsonl"


def word(token_id: int) -> str:
    """The text of a token: one word each, so a prompt has exactly as many tokens as words."""
    return f"w{token_id}"


def prompts_of(shape: Shape, steps: int, seed: int) -> list[str]:
    """Prompts in the order in which the steps take them; in each step the last ones are the long
    ones."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(steps):
        for place in range(shape.prompts):
            ids = [
                rng.randrange(FIRST_WORD_ID, FIRST_LONG_WORD_ID) for _ in range(shape.prompt_len)
            ]
            if place >= shape.prompts - shape.long_prompts:
                ids[-1] = rng.randrange(FIRST_LONG_WORD_ID, VOCAB_SIZE)
            prompts.append(" ".join(map(word, ids)))
    return prompts


def reward_of(response_ids: list[int]) -> float:
    """Share of even token ids: cheap, and different for the siblings of a group."""
    return sum(1 for token in response_ids if token % 2 == 0) / max(len(response_ids), 1)
