"""Make the questions, a tokenizer with a chat template and one token for a call, and an untrained
model.

    python examples/openai_agent/make_data.py outputs/openai_agent

`sft.jsonl` has what a careless teacher does: half of the time it asks the calculator, and it often
miscopies a digit.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

# The model and the problems are made as the arithmetic task's are.
sys.path.append(str(Path(__file__).parent.parent / "arithmetic"))

from make_task import CHARACTERS, SPECIALS, make_model, make_problems, make_tokenizer

CALL = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
ROLES = ("<|user|>", "<|assistant|>", "<|tool|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 64
ASKS = 0.5
CARE = 0.7
"""How often the teacher asks, and how often it copies a digit as it is."""


def make_data(directory: Path, seed: int = 0) -> None:
    """Write `model/` and one JSONL file per split into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    problems, rng = make_problems(seed), random.Random(seed)
    for split in ("train", "heldout"):
        _write(directory / f"{split}.jsonl", [_asked(row) for row in problems[split]])
    taught = [turn for row in problems["train"] for turn in _taught(row, rng)]
    _write(directory / "sft.jsonl", taught)
    specials = (*SPECIALS, *ROLES, CALL)
    model = directory / "model"
    make_model(model, seed, len(specials) + len(CHARACTERS), CONTEXT)
    make_tokenizer(model, CHARACTERS, specials, CONTEXT)
    _take_any_text(model / "tokenizer.json")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _asked(row: dict[str, str]) -> dict:
    return {"input": [{"role": "user", "content": row["input"]}], "label": row["label"]}


def _taught(row: dict[str, str], rng: random.Random) -> list[dict[str, str]]:
    """The teacher's turns, each with what stands before it."""
    start = f"<|user|>{row['input']}<eos><|assistant|>"
    said = "".join(one if rng.random() < CARE else rng.choice("0123456789") for one in row["label"])
    if rng.random() > ASKS:
        return [{"input": start, "label": said}]
    told = f"{start}{CALL}<eos><|tool|>{row['label']}<eos><|assistant|>"
    return [{"input": start, "label": CALL}, {"input": told, "label": said}]


def _take_any_text(file: Path) -> None:
    """Servers try a template out on words that this task has no letters for: they are padding."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["unk_token"] = SPECIALS[0]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/openai_agent/make_data.py DIRECTORY")
    make_data(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}")
