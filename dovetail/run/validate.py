"""What only the tables can tell: names of rewards, algorithms, engines. Needs no torch and no
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.algorithms import table as algorithms
from dovetail.config.check import check, check_names
from dovetail.config.passthrough import handed
from dovetail.config.reward_rules import asked_rewards
from dovetail.config.run import RunConfig
from dovetail.engines import table as engines
from dovetail.engines.interpreter import interpreter
from dovetail.engines.launch import LaunchSettings
from dovetail.rewards import table as rewards
from dovetail.run.megatron import check_megatron
from dovetail.runtime.ray.cluster import check_ray


def validate(config: RunConfig) -> None:
    """Refuse a run that can't work, within a second.

    Raises:
        ConfigError: with every problem found, one per line.
    """
    check(config)
    validate_names(config)


def validate_names(config: RunConfig) -> None:
    """Refuse names that no table has.

    Raises:
        ConfigError: with the nearest name of the table.
    """
    check_names(
        config,
        rewards=[row.name for row in rewards.TABLE],
        advantages=list(algorithms.ADVANTAGES),
        losses=list(algorithms.LOSSES),
        engines=[row.name for row in engines.ENGINES],
    )
    if config.reward.rm_url is not None and ("remote_rm", "") in asked_rewards(config):
        from dovetail.rewards.address import check_url  # Brings aiohttp along.

        check_url(config.reward.rm_url)


def validate_cluster(config: RunConfig) -> None:
    """Refuse to train on a cluster without what starts it.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if config.runtime.mode != "local":
        check_ray()


def validate_launch(config: RunConfig, passthrough: Mapping[str, Any]) -> list[str]:
    """Refuse engines and trainers that could never be started: not installed, or with settings of
    their own that the run sets, or that they do not have.

    Returns:
        What is to be told of these settings.

    Raises:
        ConfigError: a setting is the run's, or none of the engine's.
        MissingExtraError: there is no such engine on this machine.
    """
    if config.trainer.train_backend == "megatron":
        check_megatron(passthrough)
    settings = config.engine
    if config.train_only or not settings.in_processes or settings.external_urls:
        return []
    row = engines.engine_row(settings.rollout_engine)
    if row.path is not None:
        return []
    spec = engines.load(row.launch)(
        LaunchSettings(
            model_dir=Path(str(config.model.hf_checkpoint)),
            port=0,
            max_context_len=1,
            python=interpreter(row.name, settings.engine_python),
            # Where it would be is not known without torch.
            device="cpu" if config.model.device == "cpu" else "cuda",
            return_routed_experts=config.algorithm.use_rollout_routing_replay,
            passthrough=handed(passthrough, row.name),
        )
    )
    return list(spec.notes)
