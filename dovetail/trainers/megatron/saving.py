"""Megatron's own checkpoints (`megatron.core.dist_checkpointing`, the form torch_dist): every rank
writes its shards, and any layout of ranks reads what it needs.

Weights, masters and moments are each one tensor of the whole model by its name, so any change of
layout carries them along.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dovetail.trainers.megatron.mending import KEYS, held, set_steps
from dovetail.trainers.megatron.optim import Optimizer
from dovetail.trainers.megatron.provider import bare
from dovetail.trainers.megatron.reading import check_table
from dovetail.types.errors import CheckpointError

_OF_OBJECT = re.compile(r".+/shard_[\d.]+_[\d.]+", re.DOTALL)
"""`ShardedObject.unique_key`: no tensor's name ends so."""


def write_weights(chunks: Sequence[Any], directory: Path) -> None:
    """Weights alone, as Megatron's tools read them, of a model whole on the CPU.

    Raises:
        CheckpointError: a file can't be written.
    """
    _save(_of_model(chunks), directory, _OnCpu("torch_dist", 1))


def read_weights(chunks: Sequence[Any], directory: Path) -> None:
    """Fill the modules with a checkpoint's weights.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    _put(chunks, _load(_of_model(chunks), directory))


def write_training(chunks: Sequence[Any], optimizer: Optimizer, directory: Path) -> None:
    """Weights and what following steps depend on. The latter are copied, whole, one dimension of
    data parallelism at a time.

    Raises:
        CheckpointError: a file can't be written.
    """
    state = _of_model(chunks)
    state["optimizer"] = _of_optimizer(state, optimizer, with_values=True)
    _save(state, directory)


def read_training(
    chunks: Sequence[Any], optimizer: Optimizer, directory: Path, facts: Mapping[str, Any]
) -> None:
    """Go on from what `write_training` wrote, under this or another layout.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    state = _of_model(chunks)
    state["optimizer"] = _of_optimizer(state, optimizer, with_values=False)
    found = _load(state, directory)
    _put(chunks, found)
    for number, one in enumerate(held(optimizer.optimizer)):
        for key in KEYS:
            one.put(key, found["optimizer"][number][key])
    steps = int(facts["steps_done"])
    set_steps(optimizer.optimizer, steps)
    optimizer.go_to(steps)


def _of_optimizer(
    state: Mapping[str, Any], optimizer: Optimizer, *, with_values: bool
) -> dict[int, dict[str, Any]]:
    """Masters and moments, split over ranks as the weights that they are of."""
    sharded, _ = extract_sharded_tensors_and_factories(dict(state))
    of_weight = {id(one.data): one for one in nested_values(sharded)}
    found: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(held(optimizer.optimizer)):
        like = of_weight[id(one.weight)]
        found[number] = {}
        for key in KEYS:
            data = one.whole(key) if with_values else one.blank()
            named: dict[str, Any] = {"key": f"optimizer.{key}.{like.key}", "data": data}
            if isinstance(like, ShardedTensor):
                named["dtype"] = data.dtype
            found[number][key] = dataclasses.replace(like, **named)
    return found


def _of_model(chunks: Sequence[Any]) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    # The wrappers of data parallelism would put their own names in front.
    states = [_tensors(bare(chunk).sharded_state_dict(metadata=metadata)) for chunk in chunks]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without `_extra_state` and its like: they are kept as pickles, and no weights."""
    return {name: one for name, one in state.items() if not isinstance(one, ShardedObject)}


def _put(chunks: Sequence[Any], found: Mapping[str, Any]) -> None:
    named = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    for chunk, name in zip(chunks, named, strict=True):
        missing, unexpected = bare(chunk).load_state_dict(found[name], strict=False)
        wrong = [one for one in (*missing, *unexpected) if not one.endswith("_extra_state")]
        if wrong:
            raise CheckpointError(
                f"the checkpoint is of another model: {len(wrong)} weights differ, e.g. {wrong[0]}"
            )


class _OnCpu(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's own asks CUDA whether copies are done, also where there is none; and it
    starts processes to write, which one process with everything in CPU memory does not need."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path | str) -> None:
        """As megatron-core's, by torch.distributed.checkpoint alone."""
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            mcore_to_pyt_state_dict(named, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _save(state: dict[str, Any], directory: Path, strategy: _OnCpu | None = None) -> None:
    with _told(directory, "written"):
        dist_checkpointing.save(state, str(directory), strategy)


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
    _check_kinds(directory)


def _check_kinds(directory: Path) -> None:
    """That no tensor of ours is a pickle there: torch would unpickle what it says. The objects that
    Megatron-LM writes beside weights are: they are never asked for."""
    try:
        found = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata.items()
    except Exception as error:  # A table of the right names may still build nothing.
        raise CheckpointError(f"{directory / '.metadata'} is damaged: {error}") from error
    for name, kind in found:
        if isinstance(kind, BytesStorageMetadata) and not _OF_OBJECT.fullmatch(str(name)):
            raise CheckpointError(
                f"{directory} keeps {name!r} as a pickle, where Megatron has a tensor: it could "
                "run code. It is not read"
            )


@contextmanager
def _told(directory: Path, what: str) -> Iterator[None]:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Of names within torch that megatron-core uses.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except CheckpointException as error:
        # torch's is a BaseException, which holds what each rank raised.
        inner = next((one for one, _ in error.failures.values()), error)
        raise _failure(directory, what, inner) from error
    except (CheckpointingException, OSError, RuntimeError, KeyError, ValueError) as error:
        raise _failure(directory, what, error) from error


def _failure(directory: Path, what: str, error: BaseException) -> CheckpointError:
    first = str(error).strip().splitlines()[:1] or [""]
    return CheckpointError(
        f"the Megatron checkpoint in {directory} can't be {what}: it is damaged or of another "
        f"model: {type(error).__name__}: {first[0][:300]}"
    )
