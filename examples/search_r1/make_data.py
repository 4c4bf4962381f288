"""Make the questions, a tokenizer with one token per letter and per tag, and an untrained model.

    python examples/search_r1/make_data.py outputs/search_r1

The questions ask for the numbers that the documents of corpus.jsonl give: "spider legs?" is 8.
"""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path

HERE = Path(__file__).parent
# The model and tokenizer are made as the arithmetic task's are.
sys.path.append(str(HERE.parent / "arithmetic"))

from make_task import SPECIALS, make_model, make_tokenizer  # noqa: E402

CHARACTERS = string.ascii_lowercase + string.digits + " ?"
TAGS = ("search", "information", "answer")
CONTEXT = 160


def make_data(directory: Path, seed: int = 0) -> None:
    """Write `model/` and `train.jsonl` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    documents = (HERE / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [_question(**json.loads(document)) for document in documents]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "train.jsonl").write_text(lines, encoding="utf-8")
    specials = (*SPECIALS, *(tag for name in TAGS for tag in (f"<{name}>", f"</{name}>")))
    make_model(directory / "model", seed, len(specials) + len(CHARACTERS), CONTEXT)
    make_tokenizer(directory / "model", CHARACTERS, specials, CONTEXT)


def _question(id: str, text: str) -> dict[str, str]:
    (number,) = re.findall(r"\d", text)
    return {"input": f"{id}?", "label": number}


if __name__ == "__main__":
    make_data(Path(sys.argv[1]))
