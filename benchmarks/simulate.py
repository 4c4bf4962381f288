"""What a cluster would do: how busy its devices are and how many steps it makes per hour, before
anybody rents it.

    .venv/bin/python benchmarks/simulate.py                      # 8 to 4,096 H100, a minute
    .venv/bin/python benchmarks/simulate.py --devices 64 --lengths outputs/run/samples
    .venv/bin/python benchmarks/simulate.py --check              # against real runs here

Placement is the run's own plan, admission its own state machines (`rollout/admit.py`,
`rollout/lag.py`); lengths are drawn, speeds computed. Equal arguments give an equal table.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.simulated_lengths import Lengths, lengths_of  # noqa: E402
from benchmarks.simulated_machines import (  # noqa: E402
    GPUS,
    MODELS,
    Setting,
    machine_of,
    placed,
)
from benchmarks.simulated_run import simulate  # noqa: E402
from benchmarks.simulated_work import Outcome, Work  # noqa: E402
from dovetail.types import ConfigError  # noqa: E402

WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "colocated, sync": (True, {}),
    "sync": (False, {}),
    "partial": (False, {"partial": True}),
    "lag 1": (False, {"max_lag": 1}),
    "lag 4": (False, {"max_lag": 4}),
}
"""Name -> whether on shared devices, and what `Work` says of it."""
OVER_SAMPLING = 1.5
"""Groups issued of those needed, where the rest is finished later."""
_COLUMNS = (
    ("devices", "{devices}"),
    ("trainer", "{trainer}"),
    ("engines", "{engines}"),
    ("way", "{way}"),
    ("steps/h", "{steps_per_hour:.1f}"),
    ("of sync", "{of_sync:.2f}x"),
    ("busy", "{utilisation:.0%}"),
    ("trainer busy", "{trainer_share:.0%}"),
    ("engines busy", "{engine_share:.0%}"),
    ("of peak", "{of_peak:.0%}"),
    ("wasted", "{wasted:.0%}"),
    ("mean lag", "{mean_lag:.2f}"),
    ("max lag", "{max_lag}"),
)


def rows(arguments: argparse.Namespace, lengths: Lengths) -> Iterator[dict[str, Any]]:
    """One per cluster and way."""
    for devices in arguments.devices:
        setting = Setting(
            devices,
            MODELS[arguments.model],
            GPUS[arguments.gpu],
            per_engine=arguments.per_engine,
            prompt_tokens=arguments.prompt_tokens,
            mean_tokens=mean_length(lengths, arguments.samples),
            trainer_share=arguments.trainer_share,
        )
        groups = arguments.groups or min(512, max(8, 2 * devices))
        of_sync: float | None = None
        for way, (colocated, more) in WAYS.items():
            made = placed(setting, colocated)
            machine = machine_of(setting, made)
            work = Work(
                lengths,
                groups=groups,
                samples=arguments.samples,
                steps=arguments.steps,
                refused=arguments.refused,
                prompt_tokens=arguments.prompt_tokens,
                reward_s=arguments.reward_s,
                seed=arguments.seed,
                **more,
            )
            if work.partial:
                work = replace(work, submit_size=round(groups * OVER_SAMPLING))
            outcome = simulate(machine, work)
            if way == "sync":
                of_sync = outcome.steps_per_hour
            yield {
                "devices": devices,
                "way": way,
                "groups": groups,
                "trainer": len(made.trainer_ranks),
                "engines": len(made.engines),
                **figures(outcome),
                "of_sync": outcome.steps_per_hour / (of_sync or outcome.steps_per_hour),
            }


def figures(outcome: Outcome) -> dict[str, Any]:
    """What is reported of a simulated run."""
    names = ("steps_per_hour", "step_s", "utilisation", "trainer_share", "engine_share", "of_peak")
    counts = ("issued", "trained", "dropped", "put_back", "discarded", "pending")
    return {
        **{name: getattr(outcome, name) for name in (*names, "wasted", *counts)},
        "mean_lag": sum(outcome.lags) / len(outcome.lags),
        "max_lag": max(outcome.lags),
    }


def mean_length(lengths: Lengths, samples: int) -> float:
    """Of 2,000 groups."""
    drawn = [length for n in range(2000) for length in lengths.group(random.Random(n), samples)]
    return sum(drawn) / len(drawn)


def table(found: Sequence[dict[str, Any]]) -> str:
    """For a person."""
    lines = [[name for name, _ in _COLUMNS]]
    lines += [[form.format(**row) for _, form in _COLUMNS] for row in found]
    widths = [max(len(line[at]) for line in lines) for at in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = _parser().parse_args(argv)
    if arguments.check:
        from benchmarks.simulate_check import check_against_runs

        return check_against_runs(arguments.json, arguments.rounds)
    lengths = lengths_of(arguments.lengths)
    found = []
    try:
        for row in rows(arguments, lengths):
            found.append(row)
            print(f"{row['devices']} devices, {row['way']}", file=sys.stderr)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.model} on {arguments.gpu}, lengths {arguments.lengths} (mean "
        f"{mean_length(lengths, arguments.samples):.0f} tokens), {arguments.samples} samples of a "
        f"group, {arguments.steps} steps, seed {arguments.seed}\n"
    )
    print(table(found))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, nargs="+", default=[8, 64, 512, 4096])
    add("--model", choices=sorted(MODELS), default="8b")
    add("--gpu", choices=sorted(GPUS), default="h100")
    add("--per-engine", type=int, default=1, help="devices of one engine")
    add("--trainer-share", type=float, help="of the devices; default: what balances both sides")
    add(
        "--lengths",
        default="lognormal:1500,1.0,16384",
        help="lognormal:MEDIAN,SIGMA,LIMIT, longtail:SHORT,SHARE,LIMIT, fixed:TOKENS, or samples",
    )
    add("--groups", type=int, help="of a step; default: 2 per device, 8 to 512")
    add("--samples", type=int, default=16, help="of a group")
    add("--prompt-tokens", type=int, default=512)
    add("--refused", type=float, default=0.0, help="share of groups that a filter refuses")
    add("--reward-s", type=float, default=0.0)
    add("--steps", type=int, default=12)
    add("--seed", type=int, default=0)
    add("--json", help="where to write the figures")
    add(
        "--check", action="store_true", help="predict real runs on this machine, and tell the error"
    )
    add("--rounds", type=int, default=2, help="of real runs with --check")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
