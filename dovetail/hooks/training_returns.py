"""What functions of the training side gave back, checked. Tensors are known by their attributes, so
that this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dovetail.hooks.returns import wrong
from dovetail.hooks.spec import HookSpec
from dovetail.types import CorrectionCall, HookRunError

if TYPE_CHECKING:
    from torch import Tensor

_NEEDED = ("tokens", "response_lengths")


def train_data(spec: HookSpec, got: Any) -> dict[str, Any]:
    """Columns with the same number of entries, tokens among them. What stands in them is checked
    where they become rows."""
    if not isinstance(got, Mapping):
        raise wrong(spec, got)
    missing = [name for name in _NEEDED if got.get(name) is None]
    if missing:
        raise HookRunError(
            f"{spec.where}: the function gave back a dict without {', '.join(missing)}; it has "
            f"{', '.join(map(str, got)) or 'no keys'}. Expected: {spec.returns}"
        )
    data = {str(name): column for name, column in got.items() if column is not None}
    lengths = {name: _length(spec, name, column) for name, column in data.items()}
    uneven = [f"{name} {length}" for name, length in lengths.items() if length != lengths["tokens"]]
    if uneven:
        raise HookRunError(
            f"{spec.where}: the function gave back columns of different lengths: tokens "
            f"{lengths['tokens']}, {', '.join(uneven)}; expected one entry per row in each"
        )
    return data


def _length(spec: HookSpec, name: str, column: Any) -> int:
    if isinstance(column, list | tuple) or getattr(column, "ndim", None):
        return len(column)
    raise HookRunError(
        f"{spec.where}: {name!r} of what the function gave back is a {type(column).__name__}, "
        "expected a list with one entry per row"
    )


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
