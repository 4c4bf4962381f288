"""The process that compares answers with math-verify. Run by `workers`, never imported.

Answers `{"answer", "label"}` with `{"equal": bool}`.
"""

from __future__ import annotations

from typing import Any

from dovetail.rewards.worker_process import Answer, serve


def load() -> Answer:
    """Import math-verify and build its parser's tables."""
    import logging

    from math_verify import parse, verify

    # It warns that its own time limits are off; ours is the parent that kills us.
    logging.disable(logging.CRITICAL)

    def compare(request: dict[str, Any]) -> dict[str, Any]:
        label = parse(f"${request['label']}$", parsing_timeout=None)
        answer = parse(f"${request['answer']}$", parsing_timeout=None)
        return {"equal": bool(verify(label, answer, timeout_seconds=None))}

    compare({"answer": "x+1", "label": "1+x"})
    return compare


if __name__ == "__main__":
    serve(load)
