"""Dovetail beside TRL's GRPOTrainer on this machine: tokens/s, seconds per GRPO step, memory.

    .venv/bin/python benchmarks/vs_trl.py --quick --json out.json    # under 3 minutes on 2 cores
    .venv/bin/python benchmarks/vs_trl.py --json out.json            # medians of 3 rounds

TRL runs in an environment of its own, `.venvs/trl`, made on the first run from
`requirements-trl.txt`. Method and results: docs/benchmarks.md.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.compare import main

    raise SystemExit(main())
