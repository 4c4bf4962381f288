"""The reference page of the hooks, written from the table: `python -m dovetail.hooks.docs PATH`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from dovetail.hooks.spec import FAMILIES, OWNERS, CallForm, HookSpec, OnError
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

Where a family's guides and its code call a function differently, both work: a function gets what
its parameters ask for. Between forms of the same number of parameters their names and annotations
decide, as each hook's table says. Values passed by keyword are shown as `name=`; a function gets
those that it names.

The *rollout* process is the one of `dovetail train`: loop, data, rewards and router are there. The
*trainer* process is the same one in mode `local`; on a cluster it is each trainer rank: functions
of training are called on every rank, and given the same have to answer the same on each. What a
function keeps in its module is of its process. *engine* is each `dovetail serve` process.

`args` is a copy of the whole configuration with flat names (`args.rollout_batch_size`). What you
write to it is seen by later hooks, never by the run. It also has what plugins of these families
read and no setting of ours stands for, facts of the run (`rank`, `world_size`, `start_rollout_id`,
the router's address), the keys of the YAML file named by `--custom-config-path`, and those of
`[hooks.plugin_args]`. A rollout, evaluation, generate or reward function with an attribute
`add_arguments(parser)` brings flags of its own; their values are attributes too.

A function that does not return within its time limit is ended, where that is possible, or left
behind; the error says where it stands. An error that ends the run names flag, function, sample and
your line.

Before a run loads anything, its functions are tried out on the first rows of the data, or on
made-up samples, in a process of their own without a model. One that breaks its contract, hangs or
ends the process stops the run with your line; one that can't be judged there (a service is down)
is warned about. `args.rehearsal` is true meanwhile, for functions with effects outside of the run.
`dovetail hooks check` does this alone, `--no-check-hooks` does without, and
`dovetail hooks new NAME` writes a file to start from.

This page is generated from the table in `dovetail/hooks/rows`.
"""

_ON_ERROR = {
    OnError.STOP: "the run ends and names the hook and your line",
    OnError.DROP: "the group is left out and counted; max_failed_groups in a row end the run",
    OnError.COUNT: "the sample gives no gradient and is counted; max_reward_failures in a row end "
    "the run",
    OnError.KEEP: "what its session recorded is kept, with a warning; before its first answer the "
    "group is left out and counted",
}


def page() -> str:
    """The whole page."""
    rows = "\n".join(
        f"| [`{spec.flag}`](#{spec.slot}) | {spec.stage} | {spec.summary} |" for spec in HOOKS
    )
    overview = f"| flag | stage | |\n| --- | --- | --- |\n{rows}\n"
    return "\n".join([_HEAD, overview, *(section(spec) for spec in HOOKS)])


def section(spec: HookSpec) -> str:
    """One hook's part of the page."""
    forms = "\n".join(f"| {form.label} | `{form.signature}`{_told(form)} |" for form in spec.forms)
    facts = [
        ("TOML", f"`{spec.key}`"),
        ("called", spec.when),
        ("by", f"`{spec.stage}`, in the {spec.process} process"),
        ("returns", spec.returns),
        ("default", spec.default),
        ("if it raises", _ON_ERROR[spec.on_error]),
    ]
    if spec.owner is not None:
        facts.append(("needs", f"{OWNERS[spec.owner]}; a run without it refuses the flag"))
    if spec.repeatable:
        facts.append(("several", "the TOML value is a list, and the flag may be repeated"))
    facts.append(("time limit", f"`{spec.time_limit}`" if spec.time_limit else "none"))
    if spec.registered:
        facts.append(("by name", ", ".join(f"`{name}`" for name in spec.registered)))
    listed = "\n".join(f"- {name}: {value}" for name, value in facts)
    doc = "\n".join(textwrap.wrap(spec.doc, 100))
    return (
        f"## {spec.slot}\n\n{spec.summary} `{spec.flag}`\n\n{doc}\n\n{listed}\n\n"
        f"| family | call form |\n| --- | --- |\n{forms}\n\n```python\n{spec.example}```\n"
    )


def _told(form: CallForm) -> str:
    if not form.told_by:
        return ""
    return ", where the last parameter is named or annotated `" + "`, `".join(form.told_by) + "`"


def main(arguments: list[str]) -> int:
    """Write the page to a path, or to standard output."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
