"""What is simulated, on what, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.simulated_engines import EngineSpeed
from benchmarks.simulated_lengths import Lengths


@dataclass(frozen=True)
class Machine:
    """Devices and their speeds."""

    engines: int
    engine: EngineSpeed
    trainer_groups: int
    """Data-parallel ranks: each trains its share of the samples."""
    train_token_s: float
    """One token on one of them."""
    engine_devices: int = 1
    """Of all engines."""
    trainer_devices: int = 1
    """Of all ranks."""
    train_fixed_s: float = 0.0
    publish_s: float = 0.0
    turns: bool = False
    """Engines and trainer share the devices (colocated)."""
    switch_s: float = 0.0
    """Handing the devices over, there and back."""

    @property
    def devices(self) -> int:
        """All of them."""
        if self.turns:
            return max(self.engine_devices, self.trainer_devices)
        return self.engine_devices + self.trainer_devices


@dataclass(frozen=True)
class Work:
    """What is run."""

    lengths: Lengths
    groups: int = 32
    """Of a step."""
    samples: int = 8
    """Of a group."""
    steps: int = 20
    max_lag: int = 0
    submit_size: int | None = None
    """Groups issued at a time; above `groups`: over-sampling."""
    partial: bool = False
    """What the step does not need is finished later (max_lag 0)."""
    refused: float = 0.0
    """Share of groups that a filter refuses."""
    prompt_tokens: int = 0
    """Of each sample; the trainer reads them too."""
    reward_s: float = 0.0
    seed: int = 0
    warm_up: int = 2
    """Steps at the start that the rate leaves out."""


@dataclass
class Outcome:
    """What came of it."""

    machine: Machine
    step_ends: list[float] = field(default_factory=list)
    """When each step was published."""
    began: float = 0.0
    trainer_busy_s: float = 0.0
    """Rank-seconds of work."""
    engine_busy_s: float = 0.0
    made_tokens: float = 0.0
    trained_tokens: int = 0
    issued: int = 0
    trained: int = 0
    dropped: int = 0
    put_back: int = 0
    discarded: int = 0
    pending: int = 0
    """Groups that were under way when the run ended."""
    lags: list[int] = field(default_factory=list)
    """Of each trained group."""
    warm_up: int = 0

    @property
    def elapsed_s(self) -> float:
        """To the last publish."""
        return self.step_ends[-1]

    @property
    def step_s(self) -> float:
        """Mean time of a step, without those of the warm-up."""
        first = min(self.warm_up, len(self.step_ends) - 1)
        begin = self.step_ends[first - 1] if first else 0.0
        return (self.step_ends[-1] - begin) / (len(self.step_ends) - first)

    @property
    def steps_per_hour(self) -> float:
        """Of the run after its warm-up."""
        return 3600 / self.step_s

    @property
    def trainer_share(self) -> float:
        """Of the time of all ranks in which they compute."""
        return self.trainer_busy_s / (self.machine.trainer_groups * self.elapsed_s)

    @property
    def engine_share(self) -> float:
        """Of the time of all engines in which at least one sequence runs."""
        return self.engine_busy_s / (self.machine.engines * self.elapsed_s)

    @property
    def utilisation(self) -> float:
        """Of the time of all devices in which they work."""
        own = self.machine
        trainer = self.trainer_share * own.trainer_devices
        return (trainer + self.engine_share * own.engine_devices) / own.devices

    @property
    def of_peak(self) -> float:
        """Tokens made, of what full engines would have made all the time."""
        peak = self.machine.engine.peak_tokens_per_s * self.machine.engines
        return self.made_tokens / (peak * self.elapsed_s)

    @property
    def wasted(self) -> float:
        """Share of the tokens made that nothing was trained on."""
        return max(0.0, 1 - self.trained_tokens / self.made_tokens) if self.made_tokens else 0.0
