"""What functions of the training side gave back, checked. Tensors are known by their attributes, so
that this needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dovetail.hooks.returns import listed, wrong
from dovetail.hooks.spec import HookSpec
from dovetail.types import CorrectionCall, HookRunError, Sample

if TYPE_CHECKING:
    from torch import Tensor

_NEEDED = ("tokens", "response_lengths", "rewards", "loss_masks")


def train_data(spec: HookSpec, got: Any, samples: list[Sample]) -> dict[str, list[Any]]:
    """Columns of one length; `rollout_ids` are filled in where they are missing."""
    if not isinstance(got, Mapping):
        raise wrong(spec, got)
    missing = [name for name in _NEEDED if got.get(name) is None]
    if missing:
        raise HookRunError(
            f"{spec.where}: the function gave back a dict without {', '.join(missing)}; it has "
            f"{', '.join(map(str, got)) or 'no keys'}. Expected: {spec.returns}"
        )
    data = {name: _column(spec, name, column) for name, column in got.items() if column is not None}
    num_rows = len(data["tokens"])
    uneven = [f"{name} {len(column)}" for name, column in data.items() if len(column) != num_rows]
    if uneven or not num_rows:
        raise HookRunError(
            f"{spec.where}: the function gave back columns of different lengths: tokens "
            f"{num_rows}, {', '.join(uneven)}; expected one entry per row in each"
            if uneven
            else f"{spec.where}: the function gave back no rows for {len(samples)} samples"
        )
    for row in range(num_rows):
        _check_row(spec, data, row)
    data.setdefault("rollout_ids", _rollout_ids(num_rows, samples))
    return data


def _column(spec: HookSpec, name: str, column: Any) -> list[Any]:
    if isinstance(column, list | tuple):
        return list(column)
    found = listed(column)
    if found is None:
        raise HookRunError(
            f"{spec.where}: {name!r} of what the function gave back is a "
            f"{type(column).__name__}, expected a list with one entry per row"
        )
    return found


def _check_row(spec: HookSpec, data: dict[str, list[Any]], row: int) -> None:
    length, num_tokens = int(data["response_lengths"][row]), len(data["tokens"][row])
    mask = len(data["loss_masks"][row])
    if mask != length or length > num_tokens:
        raise HookRunError(
            f"{spec.where}: row {row} of what the function gave back has {num_tokens} tokens, a "
            f"response length of {length} and a loss mask of {mask}; expected a loss mask of the "
            "response's length, and a response no longer than the tokens"
        )


def _rollout_ids(num_rows: int, samples: list[Sample]) -> list[int]:
    """A sample's own where rows are samples; fresh ones stand apart from all of them."""
    taken = {sample.rollout_id for sample in samples}
    fresh = (number for number in itertools.count() if number not in taken)
    if num_rows != len(samples):
        return [next(fresh) for _ in range(num_rows)]
    return [next(fresh) if s.rollout_id is None else s.rollout_id for s in samples]


def set_advantages(spec: HookSpec, got: Any, data: dict[str, Any]) -> None:
    """Put what was given back into `data`, and check that it is there, one tensor per row."""
    if isinstance(got, tuple) and len(got) == 2:
        data["advantages"], data["returns"] = list(got[0]), list(got[1])
    elif isinstance(got, list):
        data["advantages"] = data["returns"] = got
    elif isinstance(got, Mapping):
        data.update({name: got[name] for name in ("advantages", "returns") if name in got})
    elif got is not None:
        raise wrong(spec, got)
    if data.get("returns") is None and data.get("advantages") is not None:
        data["returns"] = data["advantages"]
    lengths = [int(length) for length in data["response_lengths"]]
    for name in ("advantages", "returns"):
        _check_per_token(spec, name, data.get(name), lengths)


def _check_per_token(spec: HookSpec, name: str, values: Any, lengths: list[int]) -> None:
    if values is None:
        raise HookRunError(
            f'{spec.where}: after the function data["{name}"] is not set. Expected: {spec.returns}'
        )
    if len(values) != len(lengths):
        raise HookRunError(
            f"{spec.where}: the function made {len(values)} {name} for {len(lengths)} rows"
        )
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        shape = tuple(getattr(value, "shape", ("no tensor",)))
        if shape != (length,):
            raise HookRunError(
                f"{spec.where}: {name} of row {row} have the shape {shape}, expected ({length},): "
                "one value per response token"
            )


def loss_pair(spec: HookSpec, got: Any) -> tuple[Tensor, dict[str, Any]]:
    """(scalar loss, metrics)."""
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise wrong(spec, got)
    loss, metrics = got
    if not hasattr(loss, "backward") or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if hasattr(loss, "shape") else ""
        raise HookRunError(
            f"{spec.where}: the loss is a {type(loss).__name__}{shape}, expected a scalar tensor; "
            "reduce per-token values to one number"
        )
    if metrics is not None and not isinstance(metrics, Mapping):
        raise wrong(spec, got)
    return loss.reshape(()), dict(metrics or {})


def correction(
    spec: HookSpec, got: Any, call: CorrectionCall
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """(policy loss per token, loss masks, metrics)."""
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise wrong(spec, got)
    pg_loss, masks, metrics = got
    if not hasattr(pg_loss, "shape") or not isinstance(masks, list | tuple):
        raise wrong(spec, got)
    if pg_loss.numel() != call.pg_loss.numel():
        raise HookRunError(
            f"{spec.where}: the function gave back a loss of {pg_loss.numel()} tokens for "
            f"{call.pg_loss.numel()} tokens"
        )
    wanted = [tuple(mask.shape) for mask in call.loss_masks]
    shapes = [tuple(getattr(mask, "shape", ("no tensor",))) for mask in masks]
    if shapes != wanted:
        raise HookRunError(
            f"{spec.where}: the function gave back loss masks of the shapes {shapes}, expected "
            f"{wanted}"
        )
    if metrics is not None and not isinstance(metrics, Mapping):
        raise wrong(spec, got)
    return pg_loss, list(masks), dict(metrics or {})


def reducer(spec: HookSpec, got: Any) -> Callable[..., Tensor]:
    """A function from per-token values to a scalar."""
    if not callable(got) or hasattr(got, "shape"):
        raise wrong(spec, got)
    return got  # type: ignore[no-any-return]
