"""`dovetail hooks check`: a verdict per hook, in seconds, without a model."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter

from dovetail.cli.settings import read_settings
from dovetail.config.leaves import leaves
from dovetail.run.rehearse.parent import rehearse
from dovetail.run.rehearse.plan import items
from dovetail.run.rehearse.verdict import Outcome, Verdict
from dovetail.types.errors import UsageError

_WORDS = {
    Outcome.OK: "ok",
    Outcome.FORM: "ok",
    Outcome.UNKNOWN: "?",
    Outcome.LOAD: "FAIL",
    Outcome.FAULT: "FAIL",
}
_SHOWN_LINES, _WIDTH = 10, 160


def check(argv: list[str]) -> int:
    """Rehearse every hook that files and flags name; 1 if any fails.

    Raises:
        UsageError: no hook is named.
        ConfigError: an unknown name or a wrong value.
    """
    resolved = read_settings(argv)
    config = resolved.config
    asked = items(config)
    if not asked:
        raise UsageError(
            "hooks check got no hook to check; name one, e.g. dovetail hooks check "
            "--custom-rm-path reward.py:reward, or a run file with a [hooks] table"
        )
    counts: Counter[str] = Counter()
    for verdict in rehearse(resolved, asked, config.hooks.hook_check_timeout_s):
        counts[_WORDS[verdict.outcome]] += 1
        sys.stdout.write(told(verdict))
        sys.stdout.flush()
    what = {"ok": "ok", "FAIL": "failed", "?": "could not be judged"}
    told_counts = ", ".join(f"{counts[word]} {what[word]}" for word in what if counts[word])
    sys.stdout.write(f"{len(asked)} hook{'s' * (len(asked) > 1)}: {told_counts}\n")
    return 1 if counts["FAIL"] else 0


def told(verdict: Verdict) -> str:
    """The lines about one hook."""
    head = f"{_WORDS[verdict.outcome]:<4}  {leaves()[verdict.item.leaf].flag} {verdict.item.path}"
    facts = [verdict.source, verdict.form and f"called as {verdict.form}"]
    lines = [f"{head}  ({', '.join([*filter(None, facts), f'{verdict.seconds:.1f} s'])})"]
    if verdict.message:
        lines.append(textwrap.indent(verdict.message, "      "))
    lines += [f"      note: {warning}" for warning in verdict.warnings]
    if verdict.printed:
        printed = verdict.printed.splitlines()
        lines += [f"      printed: {line:.{_WIDTH}}" for line in printed[-_SHOWN_LINES:]]
    return "\n".join(lines) + "\n"
