"""Megatron's own checkpoints (`megatron.core.dist_checkpointing`, the form torch_dist): every rank
writes its shards, and any layout of ranks reads what it needs.

What a change of layout carries along depends on the optimizer. Weights and moments can be read
under other tensor, pipeline and data parallel sizes; a change of expert parallel size that makes
experts' weights data parallel or no longer so changes how many optimizers there are, and only
weights can be taken over (through `dovetail convert`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling

from dovetail.trainers.megatron.mending import with_moments
from dovetail.trainers.megatron.optim import Optimizer
from dovetail.trainers.megatron.provider import bare
from dovetail.trainers.megatron.reading import check_table
from dovetail.types.errors import CheckpointError

FORMAT = "dovetail-megatron-torch_dist-1"


def write_weights(chunks: Sequence[Any], directory: Path) -> None:
    """Weights alone, as Megatron's tools read them."""
    _save(_of_model(chunks), directory)


def read_weights(chunks: Sequence[Any], directory: Path) -> None:
    """Fill the modules with a checkpoint's weights.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    _put(chunks, _load(_of_model(chunks), directory))


def write_training(chunks: Sequence[Any], optimizer: Optimizer, directory: Path) -> None:
    """Weights and what following steps depend on.

    Raises:
        CheckpointError: a file can't be written.
    """
    with_moments(optimizer.optimizer)
    state = _of_model(chunks)
    state["optimizer"] = optimizer.optimizer.sharded_state_dict(
        dict(state), metadata=_metadata(optimizer)
    )
    _save(state, directory)


def read_training(
    chunks: Sequence[Any], optimizer: Optimizer, directory: Path, facts: Mapping[str, Any]
) -> None:
    """Go on from what `write_training` wrote, under this or another layout.

    Raises:
        CheckpointError: it is damaged, of another model, or of a layout that can't be changed.
    """
    parts = len(optimizer.parts)
    if facts.get("optimizers") != parts:
        raise CheckpointError(
            f"the checkpoint in {directory} has {facts.get('optimizers')} optimizers (of experts "
            f"apart from other weights or not), this layout {parts}: Megatron can't change that. "
            "Continue with the --expert-model-parallel-size (TOML: "
            "trainer.expert_model_parallel_size) of the run that wrote it, or start anew from its "
            "weights (dovetail convert)"
        )
    with_moments(optimizer.optimizer)
    state = _of_model(chunks)
    state["optimizer"] = optimizer.optimizer.sharded_state_dict(
        dict(state), is_loading=True, metadata=_metadata(optimizer)
    )
    found = _load(state, directory)
    _put(chunks, found)
    optimizer.optimizer.load_state_dict(found["optimizer"])
    optimizer.go_to(int(facts["steps_done"]))


def _metadata(optimizer: Optimizer) -> dict[str, Any]:
    own: dict[str, Any] = {"chained_optim_avoid_prefix": True}
    if optimizer.config.use_distributed_optimizer:
        own["distrib_optim_sharding_type"] = "fully_reshardable"
    return own


def _of_model(chunks: Sequence[Any]) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    # The wrappers of data parallelism would put their own names in front.
    states = [bare(chunk).sharded_state_dict(metadata=metadata) for chunk in chunks]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def _put(chunks: Sequence[Any], found: Mapping[str, Any]) -> None:
    named = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    for chunk, name in zip(chunks, named, strict=True):
        missing, unexpected = bare(chunk).load_state_dict(found[name], strict=False)
        wrong = [one for one in (*missing, *unexpected) if not one.endswith("_extra_state")]
        if wrong:
            raise CheckpointError(
                f"the checkpoint is of another model: {len(wrong)} weights differ, e.g. {wrong[0]}"
            )


def _save(state: dict[str, Any], directory: Path) -> None:
    with _told(directory, "written"):
        dist_checkpointing.save(state, str(directory))


def _load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    _check(directory)
    with _told(directory, "read"):
        found: dict[str, Any] = dist_checkpointing.load(
            state, str(directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED
        )
        return found


def _check(directory: Path) -> None:
    """That it is such a checkpoint, whose reading runs no code."""
    try:
        kind = json.loads((directory / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} is no checkpoint of Megatron's: metadata.json is missing or damaged"
        ) from error
    if kind != "torch_dist":
        raise CheckpointError(
            f"{directory} is a Megatron checkpoint of the form {kind!r}; only torch_dist is read"
        )
    for table in directory.glob("**/.metadata"):
        check_table(table)


@contextmanager
def _told(directory: Path, what: str) -> Iterator[None]:
    try:
        with torch.no_grad():
            yield
    except (CheckpointingException, OSError, RuntimeError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[:1] or [""]
        raise CheckpointError(
            f"the Megatron checkpoint in {directory} can't be {what}: {type(error).__name__}: "
            f"{first[0][:300]}"
        ) from error
