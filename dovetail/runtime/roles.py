"""Every role of a plan with the memory it is expected to need, and the whole as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.runtime.memory import Memory, engine_memory, frozen_memory, trainer_memory
from dovetail.runtime.parameters import ParameterCount
from dovetail.runtime.plan import Cluster, Device, Plan
from dovetail.runtime.shape import ModelShape

_UNITS = {"GiB": 1024**3, "MiB": 1024**2}
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "total")


@dataclass(frozen=True, slots=True)
class Role:
    """Processes that need the same."""

    name: str
    devices: tuple[Device, ...]
    memory: Memory
    """Of each device."""
    generates: bool = False
    """An engine; else a model of the trainer."""


def roles(config: RunConfig, plan: Plan, shape: ModelShape, count: ParameterCount) -> list[Role]:
    """The models of the trainer by pipeline stage, then the engines. A critic, a reference and a
    teacher count as if they had the policy's sizes."""
    found = [
        Role(f"{name}{_stage(plan, stage)}", devices, memory)
        for stage in range(plan.layout.pp if plan.trainer_ranks else 0)
        for devices in [_of_stage(plan, stage)]
        for name, memory in _models(config, plan, shape, count, stage)
    ]
    if plan.engines:
        devices = tuple(device for engine in plan.engines for device in engine.devices)
        name = "engine" if len(plan.engines) == 1 else f"engine 0-{len(plan.engines) - 1}"
        found.append(Role(name, devices, engine_memory(config, plan, shape, count), True))
    return found


def peaks(config: RunConfig, plan: Plan, of: Sequence[Role]) -> dict[Device, float]:
    """Bytes that each device needs at once: where trainer and engine take turns and move out of
    each other's way, the larger of the two."""
    sums: dict[Device, list[float]] = {}
    for role in of:
        for device in role.devices:
            sums.setdefault(device, [0.0, 0.0])[role.generates] += role.memory.total
    runtime, on_gpu = config.runtime, plan.device != "cpu"
    moves = plan.mode == "colocated" and on_gpu
    moves = moves and runtime.offload_train is not False and runtime.offload_rollout is not False
    return {device: max(both) if moves else sum(both) for device, both in sums.items()}


def table(
    config: RunConfig, plan: Plan, cluster: Cluster, shape: ModelShape, count: ParameterCount
) -> str:
    """The plan for a person: one line, a row per role, what each device needs at most, and what
    there is too little of."""
    found = roles(config, plan, shape, count)
    most = max((role.memory.total for role in found), default=0.0)
    unit = "GiB" if most >= _UNITS["GiB"] else "MiB"
    rows = [(f"{unit} of each device", "where", *(name.replace("_", " ") for name in _COLUMNS))]
    rows += [(role.name, _places(role.devices), *_cells(role.memory, unit)) for role in found]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [plan.describe(), f"policy: {_parameters(count)}", ""]
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        right = "  ".join(
            cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)
        )
        lines.append(f"{left}  {right}".rstrip())
    lines += ["", *_totals(config, plan, cluster, found)]
    return "\n".join(lines) + "\n"


def _models(
    config: RunConfig, plan: Plan, shape: ModelShape, count: ParameterCount, stage: int
) -> Iterator[tuple[str, Memory]]:
    trained = trainer_memory(config, plan.layout, shape, count, stage)
    frozen = frozen_memory(config, plan.layout, count, stage)
    yield "trainer", trained
    if config.has_critic:
        yield "critic", trained
    if config.algorithm.needs_reference:
        yield "reference", frozen
    if config.has_teacher and config.distillation.opd_teacher_load is not None:
        yield "teacher", frozen


def _of_stage(plan: Plan, stage: int) -> tuple[Device, ...]:
    return tuple(one.device for one in plan.trainer_ranks if one.coordinates.pp == stage)


def _stage(plan: Plan, stage: int) -> str:
    return f", stage {stage}" if plan.layout.pp > 1 else ""


def _totals(
    config: RunConfig, plan: Plan, cluster: Cluster, found: Sequence[Role]
) -> Iterator[str]:
    needs = peaks(config, plan, found)
    if not needs:
        return
    if plan.device == "cpu":
        # Processes of a node share its memory.
        nodes: dict[int, float] = {}
        for device, need in needs.items():
            nodes[device.node] = nodes.get(device.node, 0.0) + need
        most, what = max(nodes.values()), "a node"
    else:
        most, what = max(needs.values()), "a GPU"
    gib, has = _UNITS["GiB"], cluster.memory_bytes
    of = "" if has is None else f" of {has / gib:.1f}"
    yield f"at most {most / gib:.1f}{of} GiB on {what}, without what the framework itself takes"
    if has is not None and most > has:
        yield (
            f"too little memory is likely: more ranks, {cure('gradient_checkpointing')}, or less "
            f"{cure('max_tokens_per_gpu')}"
        )


def _cells(memory: Memory, unit: str) -> list[str]:
    return [f"{getattr(memory, name) / _UNITS[unit]:.2f}" for name in _COLUMNS]


def _parameters(count: ParameterCount) -> str:
    text = f"{_large(count.total)} parameters"
    if count.experts:
        text += f", {_large(count.experts)} of them in experts"
    if count.adapters:
        text += f"; adapters of {_large(count.adapters)} are trained"
    return text


def _large(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)


def _places(devices: Sequence[Device]) -> str:
    """`node 0: 0-3; node 1: 0, 2`; of many nodes that give the same, `nodes 0-7: 0-3`."""
    by_node: dict[int, list[int]] = {}
    for device in devices:
        indices = by_node.setdefault(device.node, [])
        if device.index not in indices:
            indices.append(device.index)
    alike: dict[str, list[int]] = {}
    for node, indices in by_node.items():
        alike.setdefault(_ranges(sorted(indices)), []).append(node)
    return "; ".join(
        f"node{'s' if len(nodes) > 1 else ''} {_ranges(nodes)}: {text}"
        for text, nodes in alike.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 6`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
