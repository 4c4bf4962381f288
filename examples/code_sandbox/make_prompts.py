"""Prompts for the code sandbox: "7=" asks for a Python expression with the value 7.

    python examples/code_sandbox/make_prompts.py outputs/code_sandbox.jsonl

They use the characters of examples/arithmetic, so its model and tokenizer will do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def make_prompts(path: Path) -> None:
    """One row per value from 0 to 9; what the model writes is printed by `print(...)`."""
    rows = [
        {"input": f"{n}=", "label": str(n), "metadata": {"template": "print({})"}}
        for n in range(10)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    make_prompts(Path(sys.argv[1]))
