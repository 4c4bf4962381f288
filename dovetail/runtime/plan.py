"""Placement: a pure function from the configuration to who gets which devices, printable before
a run.

Trainers, engines and user code never see the mode; only `run/build.py` reads the plan.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dovetail.config.sections import ModelConfig, RuntimeConfig
from dovetail.types.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Where each role lives."""

    mode: str
    device: str
    """`cpu`, or `cuda:0` shared by trainer and engine."""
    num_threads: int
    """CPU threads for tensor work."""
    shares_tensors: bool
    """True: engine and trainer read the same parameters, and publishing copies nothing."""

    def describe(self) -> str:
        """One line for a person."""
        where = f"{self.device}, {self.num_threads} threads"
        if self.shares_tensors:
            return f"{self.mode}: one process on {where}, engine and trainer share their tensors"
        return f"{self.mode}: trainer on {where}; engines in other processes, with own tensors"


def plan(
    runtime: RuntimeConfig, model: ModelConfig, *, has_cuda: bool, in_processes: bool = False
) -> Plan:
    """Place every role.

    Args:
        runtime: mode.
        model: device and thread wishes.
        has_cuda: whether this machine has a usable GPU.
        in_processes: whether engines have processes of their own.

    Raises:
        ConfigError: the mode has no runtime here, or a GPU is asked for where there is none.
    """
    if runtime.mode != "local":
        raise ConfigError(
            f"mode '{runtime.mode}' needs a cluster runtime, which this version does not have; "
            "the only mode is 'local' (--mode local, TOML: runtime.mode)"
        )
    if model.device == "cuda" and not has_cuda:
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no GPU; "
            "use --device auto or --device cpu (TOML: model.device)"
        )
    device = "cuda:0" if has_cuda and model.device != "cpu" else "cpu"
    threads = model.num_threads or len(os.sched_getaffinity(0))
    return Plan(
        mode="local",
        device=device,
        num_threads=threads,
        shares_tensors=not in_processes,
    )
