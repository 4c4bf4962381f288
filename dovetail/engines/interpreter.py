"""Which Python an engine's server runs in: engines pin other packages than a run does."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def interpreter(engine: str, asked: str | None = None) -> str:
    """The Python that has `engine` installed.

    That is the one asked for, else the one that the environment variable DOVETAIL_VLLM_PYTHON
    (of SGLang DOVETAIL_SGLANG_PYTHON) names, else the one that `make vllm` makes beside this
    Python's own environment, else this Python.
    """
    named = asked or os.environ.get(f"DOVETAIL_{engine.upper()}_PYTHON")
    if named:
        return named
    beside = Path(sys.prefix).parent / ".venvs" / engine / "bin" / "python"
    return str(beside) if beside.exists() else sys.executable
