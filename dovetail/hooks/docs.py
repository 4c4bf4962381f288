"""The reference page of the hooks, written from the table: `python -m dovetail.hooks.docs PATH`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from dovetail.hooks.spec import FAMILIES, HookSpec, OnError
from dovetail.hooks.table import HOOKS

_HEAD = f"""\
# Hooks

A hook is a plain Python function of yours that replaces one stage of the loop. Name it by its flag
or in the `[hooks]` table of the run file:

```toml
[hooks]
custom_rm_path = "reward.py:reward"
```

A path is a registered name, `pkg.mod.attr`, `pkg.mod:attr` or `path/file.py:attr`. Modules are
looked for on `PYTHONPATH` and in the working directory; a file also sees the files beside it.

The call form is found once, before anything is loaded: by count and kind of the parameters, then by
the first one's name (`args` or not). Functions, async functions, classes, callable objects and
`functools.partial` are all fine. A function that fits no form stops the run with its signature, the
accepted forms, and what differs. `{"`, `".join(family + ":" for family in FAMILIES)}` before a path
force a family's form; without that, `(*args, **kwargs)` is called in the slime family's.

`args` is a copy of the whole configuration with flat names (`args.rollout_batch_size`). What you
write to it is seen by later hooks, never by the run.

This page is generated from the table in `dovetail/hooks/rows`.
"""

_ON_ERROR = {
    OnError.STOP: "the run ends and names the hook and your line",
    OnError.DROP: "the group is left out and counted; max_failed_groups in a row end the run",
    OnError.COUNT: "the sample gives no gradient and is counted; max_reward_failures in a row end "
    "the run",
}


def page() -> str:
    """The whole page."""
    rows = "\n".join(f"| [`{spec.flag}`](#{spec.slot}) | {spec.summary} |" for spec in HOOKS)
    overview = f"| flag | |\n| --- | --- |\n{rows}\n"
    return "\n".join([_HEAD, overview, *(section(spec) for spec in HOOKS)])


def section(spec: HookSpec) -> str:
    """One hook's part of the page."""
    forms = "\n".join(f"| {form.label} | `{form.signature}` |" for form in spec.forms)
    facts = [
        ("TOML", f"`{spec.key}`"),
        ("called", spec.when),
        ("by", f"`{spec.stage}`, in the {spec.process} process"),
        ("returns", spec.returns),
        ("default", spec.default),
        ("if it raises", _ON_ERROR[spec.on_error]),
    ]
    if spec.registered:
        facts.append(("by name", ", ".join(f"`{name}`" for name in spec.registered)))
    listed = "\n".join(f"- {name}: {value}" for name, value in facts)
    doc = "\n".join(textwrap.wrap(spec.doc, 100))
    return (
        f"## {spec.slot}\n\n{spec.summary} `{spec.flag}`\n\n{doc}\n\n{listed}\n\n"
        f"| family | call form |\n| --- | --- |\n{forms}\n\n```python\n{spec.example}```\n"
    )


def main(arguments: list[str]) -> int:
    """Write the page to a path, or to standard output."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
