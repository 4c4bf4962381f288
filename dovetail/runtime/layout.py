"""How the trainer's ranks split the work: the coordinates of each rank.

    rank = tp + TP * (cp + CP * (dp_shard + SHARD * (dp_replicate + REPLICATE * pp)))

Neighbours in the fastest coordinate talk most, so tensor parallel ranks are next to each other and
pipeline stages far apart. It is the order of megatron-core's process groups ("tp-cp-ep-dp-pp", its
`initialize_model_parallel`) and that of a torch mesh (pp, dp_replicate, dp_shard, cp, tp). Within a
pipeline stage the same ranks are counted a second way for the experts of a layer:

    rank in stage = etp + ETP * (ep + EP * edp)
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands in each way of splitting, from 0."""

    dp_replicate: int = 0
    """Which copy of the weights: copies sum their gradients."""
    dp_shard: int = 0
    """Which share of the rows, and of sharded weights or optimizer states."""
    pp: int = 0
    cp: int = 0
    tp: int = 0
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The size of each way of splitting; `world` is the number of ranks."""

    world: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that see rows of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def edp(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.world // (self.pp * self.ep * self.etp)

    def at(self, rank: int) -> Coordinates:
        """The coordinates of `rank`."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        rest, dp_shard = divmod(rest, self.dp_shard)
        pp, dp_replicate = divmod(rest, self.dp_replicate)
        in_stage, etp = divmod(rank % (self.world // self.pp), self.etp)
        return Coordinates(dp_replicate, dp_shard, pp, cp, tp, in_stage % self.ep, etp)

    def describe(self) -> str:
        """The sizes above 1, e.g. `dp 4 x tp 2`."""
        named = (
            ("copies", self.dp_replicate),
            ("dp", self.dp_shard),
            ("pp", self.pp),
            ("cp", self.cp),
            ("tp", self.tp),
        )
        text = " x ".join(f"{name} {size}" for name, size in named if size > 1)
        experts = f"ep {self.ep}" if self.ep > 1 else ""
        return ", ".join(part for part in (text, experts) if part)


ALONE = Layout()
"""One rank."""


def layout(config: RunConfig) -> Layout:
    """The layout that a configuration asks for, which the rules of `dovetail.config` let pass."""
    own, world = config.trainer, config.runtime.trainer_ranks
    if config.runtime.mode == "local":
        return ALONE
    dp = world // own.ranks_per_replica
    tp = own.tensor_model_parallel_size
    return Layout(
        world=world,
        dp_replicate=own.dp_replicate_size,
        dp_shard=dp // own.dp_replicate_size,
        pp=own.pipeline_model_parallel_size,
        cp=own.context_parallel_size,
        tp=tp,
        ep=own.expert_model_parallel_size,
        etp=own.expert_tensor_parallel_size or tp,
    )
