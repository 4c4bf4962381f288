"""The reward of a program that the model wrote: does it run, and does it print what it should?

A row's label is the output to expect. Its metadata may have `tests`, a list of {"stdin", "stdout"},
instead, and `template`, a text with {} in which the response is put before it runs.
Limits come from `--custom-config-path`, e.g. `sandbox_cpu_s: 2` (every field of `Limits`).
"""

import asyncio
import dataclasses
import os
import re
import weakref

from sandbox import Limits, Reason, run_program

RUNS, RIGHT = 0.2, 0.8
FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)

# A semaphore belongs to an event loop, and training and evaluation may have one each.
_gates = weakref.WeakKeyDictionary()


async def reward(args, sample, **kwargs) -> float:
    """0.2 for a program that ends by itself and well, up to 0.8 more for the tests it passes."""
    program = program_of(sample)
    tests = sample.metadata.get("tests") or [{"stdin": "", "stdout": str(sample.label)}]
    async with _gate():
        outcomes = [await run_program(program, test["stdin"], limits_of(args)) for test in tests]
    sample.metadata["sandbox"] = [outcome.reason.value for outcome in outcomes]
    passed = [
        outcome.reason is Reason.FINISHED and outcome.stdout.split() == test["stdout"].split()
        for outcome, test in zip(outcomes, tests, strict=True)
    ]
    runs = all(outcome.reason is Reason.FINISHED for outcome in outcomes)
    return RUNS * runs + RIGHT * sum(passed) / len(passed)


def program_of(sample) -> str:
    """The last fenced block of the response, or all of it."""
    text = sample.response.removesuffix("<eos>")
    blocks = FENCED.findall(text)
    return sample.metadata.get("template", "{}").replace("{}", blocks[-1] if blocks else text)


def limits_of(args) -> Limits:
    """The defaults, and what the run's own configuration has as `sandbox_<name>`."""
    names = [field.name for field in dataclasses.fields(Limits)]
    default = Limits()
    given = {name: getattr(args, f"sandbox_{name}", getattr(default, name)) for name in names}
    return Limits(**given)


def log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    """How the programs of a step ended, as metrics."""
    ends = [end for sample in samples for end in sample.metadata.get("sandbox", ())]
    for reason in Reason:
        share = ends.count(reason.value) / max(len(ends), 1)
        rollout_extra_metrics[f"sandbox/{reason.value}"] = share
    return False


def _gate() -> asyncio.Semaphore:
    """As many programs at once as there are processors."""
    loop = asyncio.get_running_loop()
    if loop not in _gates:
        _gates[loop] = asyncio.Semaphore(os.cpu_count() or 1)
    return _gates[loop]
