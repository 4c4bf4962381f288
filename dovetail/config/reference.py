"""Help and the reference page, written from the declarations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from dovetail.config.aliases import ALIASES, FIXED, UNSUPPORTED, WITHOUT_EFFECT
from dovetail.config.eval_sets import KEYS
from dovetail.config.leaves import Leaf, leaves, sections
from dovetail.config.passthrough import PREFIXES
from dovetail.config.show import toml_value

_METAVARS = {"int": "INT", "float": "NUMBER", "str": "TEXT", "json": "JSON"}
_LISTS = {"list[str]": "TEXT ...", "list[int]": "INT ..."}
_LITERAL_ZERO = ("int", "float")
_HELP_COLUMN = 38


def flag_help(width: int = 100, read: Mapping[str, set[str] | None] | None = None) -> str:
    """Flags, grouped by section, for a terminal of `width` columns.

    Args:
        read: sections, and which of their settings (None: all); default: everything.
    """
    blocks = []
    for section, declaration in sections().items():
        if read is not None and section not in read:
            continue
        wanted = None if read is None else read[section]
        lines = [f"{section}: {_first_line(declaration.__doc__)}"]
        for leaf in leaves().values():
            if leaf.section == section and (wanted is None or leaf.name in wanted):
                lines += _help_lines(leaf, width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0]


def _help_lines(leaf: Leaf, width: int) -> list[str]:
    head = f"  {_usage(leaf)}"
    text = leaf.help + _default(leaf)
    indent = " " * _HELP_COLUMN
    wrapped = textwrap.wrap(text, max(width, 60), initial_indent=indent, subsequent_indent=indent)
    if len(head) <= _HELP_COLUMN - 2:
        wrapped[0] = head + wrapped[0][len(head) :]
        return wrapped
    return [head, *wrapped]


def _usage(leaf: Leaf) -> str:
    if leaf.kind == "bool":
        return f"--[no-]{leaf.flag[2:]}" if leaf.default else leaf.flag
    if leaf.choices:
        return f"{leaf.flag} {{{','.join(leaf.choices)}}}"
    return f"{leaf.flag} {_LISTS.get(leaf.kind) or _METAVARS[leaf.kind]}"


def _default(leaf: Leaf) -> str:
    if leaf.default in (None, False, [], {}) and leaf.kind not in _LITERAL_ZERO:
        return ""
    if leaf.kind == "bool":
        return " [on]"
    default = _number(leaf.default) if isinstance(leaf.default, float) else str(leaf.default)
    return "" if leaf.default is None else f" [{default}]"


def _number(value: float) -> str:
    return f"{value:g}"


def markdown() -> str:
    """The whole reference page."""
    parts = [_PREAMBLE]
    for section, declaration in sections().items():
        parts.append(f"## [{section}]\n\n{_first_line(declaration.__doc__)}\n")
        rows = [_row(leaf) for leaf in leaves().values() if leaf.section == section]
        parts.append("| key | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows))
        parts.append("")
    parts.append(_foreign())
    return "\n".join(parts)


def _row(leaf: Leaf) -> str:
    default = "" if leaf.default is None else f"`{_toml_default(leaf.default)}`"
    value = ", ".join(f"`{choice}`" for choice in leaf.choices) or leaf.expected
    meaning = leaf.help.replace("|", "\\|")
    return f"| `{leaf.name}` | {value} | {default} | {meaning} |"


def _toml_default(value: Any) -> str:
    return _number(value) if isinstance(value, float) else toml_value(value)


def _flags(names: list[str]) -> str:
    return ", ".join(f"`--{name.replace('_', '-')}`" for name in names)


def _grouped(table: dict[str, str]) -> str:
    reasons = dict.fromkeys(table.values())
    return "\n".join(
        f"- {reason}: {_flags([name for name in table if table[name] == reason])}"
        for reason in reasons
    )


def _foreign() -> str:
    rows = []
    for name, alias in ALIASES.items():
        flag = f"--{name.replace('_', '-')}"
        becomes = "false" if alias.negates else toml_value(alias.constant)
        own_value = alias.takes_value and alias.constant is None
        means = alias.leaf if own_value else f"{alias.leaf} = {becomes}"
        rows.append(f"| `{flag}` | `{means}` |")
    fixed = "\n".join(f"| `--{k.replace('_', '-')}` | only `{v[0]}` |" for k, v in FIXED.items())
    prefixes = ", ".join(f"`--{prefix}-*`" for prefix in PREFIXES)
    return f"""## Evaluation sets

`--eval-prompt-data NAME PATH NAME PATH` names sets that share the settings above. A table
`[eval.eval_sets.NAME]` names one with settings of its own: {", ".join(f"`{key}`" for key in KEYS)}.
`[eval.eval_defaults]` has the same keys but `path`, and so have the sets of a YAML file
(`--eval-config`). [evaluation.md](evaluation.md) says what each means.

## Foreign spellings

| flag | means |
|---|---|
{chr(10).join(rows)}
{fixed}

{prefixes} are kept for the owners of those parts; a run that starts none of them says so once.

Accepted without effect, because a run on one device gives the same result:

{_grouped(WITHOUT_EFFECT)}

Known, but not supported by this version; they stop the run by name:

{_grouped(UNSUPPORTED)}
"""


_PREAMBLE = """# Configuration reference

Written by `make docs` from the declarations in `dovetail/config/sections/`; do not edit.

A value comes from the default, then from TOML files from left to right, then from flags; the last
one wins. The TOML key is `section.key`; the flag is `--` and the key with dashes:

    dovetail train run.toml site.toml --rollout-batch-size 32 --rollout-stop END --no-save-samples

Switches are `--key` and `--no-key`; `--no-key` also unsets a value that may be unset and empties a
list. Tables are given as JSON: `--apply-chat-template-kwargs '{"enable_thinking": false}'`. Run
files come before all flags. `dovetail config show` prints every value with its origin,
`dovetail config check` looks for impossible combinations, `dovetail config diff A.toml B.toml`
compares.
"""
