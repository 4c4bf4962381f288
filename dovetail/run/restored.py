"""The trained policy of a checkpoint in a model of this process, whoever wrote it: one trainer, or
ranks on a cluster; and the settings of a run in which nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dovetail.checkpoint.manager import Checkpoint
from dovetail.config.resolve import Resolved
from dovetail.run.megatron import load_offline
from dovetail.run.policy import POLICY
from dovetail.trainers.megatron import FORMAT as MEGATRON
from dovetail.trainers.torch.restore import restore_sharded, restore_weights


def restore_policy(model: Any, checkpoint: Checkpoint) -> None:
    """Put the weights of `checkpoint` into `model`, in place.

    Raises:
        CheckpointError: it has none that this process can read, or they are another model's.
        MissingExtraError: Megatron wrote it, and is not installed here.
    """
    if POLICY not in checkpoint.written:
        restore_weights(model, *checkpoint.part(POLICY))
        return
    # Inside, the policy has a folder beside that of a critic.
    own, place = checkpoint.written[POLICY].get(POLICY, {}), checkpoint.directory(POLICY) / POLICY
    if own.get("format") == MEGATRON:
        load_offline().restore_megatron(model, place)
    else:
        restore_sharded(model, place, own)


def untrained(resolved: Resolved) -> Resolved:
    """A run's settings for one that only reads its policy: the engine may have the weights
    themselves, with trained adapters added to them."""
    config = resolved.config
    parts = {
        "rollout": config.rollout.model_copy(update={"max_lag": 0}),
        "trainer": config.trainer.model_copy(update={"lora_rank": 0}),
    }
    return replace(resolved, config=config.model_copy(update=parts))
