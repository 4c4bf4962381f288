"""A run that works, and how to spoil it: what the tests of bad input and of signals start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.loop.tiny import make_model, make_rows

REWARD = "def reward(sample):\n    return float(sum(map(str.isdigit, sample.response)))\n"


@dataclass(frozen=True)
class Place:
    """A good model, data and reward, shared; and an empty directory of the test's own."""

    shared: Path
    own: Path

    @property
    def run_dir(self) -> Path:
        return self.own / "run"

    def write(self, name: str, content: str | bytes) -> str:
        path = self.own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def flags(self, **changes: object) -> list[str]:
        """A run that works, changed: None leaves a flag out, True is a bare flag."""
        values: dict[str, object] = {
            "hf_checkpoint": self.shared / "model",
            "prompt_data": self.shared / "rows.jsonl",
            "label_key": "label",
            "custom_rm_path": f"{self.shared / 'good.py'}:reward",
            "num_rollout": 1,
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 4,
            "dtype": "float32",
            "device": "cpu",
            "num_threads": 1,
            "progress": "off",
            "run_dir": self.run_dir,
        }
        return to_flags({**values, **changes, "use_tensorboard": False})

    def train(self, **changes: object) -> list[str]:
        return ["train", *self.flags(**changes)]


def to_flags(values: dict[str, object]) -> list[str]:
    argv: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            argv += [f"--{flag}", *map(str, value)]
        else:
            argv += [f"--{flag}", str(value)]
    return argv


def make_shared(directory: Path) -> Path:
    """The good model `model/`, the data `rows.jsonl` and the reward `good.py`."""
    make_model(directory / "model")
    make_rows(directory / "rows.jsonl")
    (directory / "good.py").write_text(REWARD, encoding="utf-8")
    return directory
