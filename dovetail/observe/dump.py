"""Samples on disk: one JSON object per line, written whole or not at all.

A field that has its default is left out of its line; reading puts it back. Arrays and tensors
become lists. Lines are plain JSON except where a number is not finite: `NaN` and `Infinity` are
then written as Python's `json` does, because losing them would change a replay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from dovetail.observe.atomic import write_atomic
from dovetail.types.errors import DataError
from dovetail.types.sample import Sample

_DEFAULTS = Sample().to_dict()
_NONE = object()
"""The default of attributes that have none."""
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_NUMBER_LISTS = {
    "tokens",
    "loss_mask",
    "rollout_top_p_token_ids",
    "rollout_top_p_token_offsets",
    "rollout_routed_experts",
}
"""Long integers only: never searched for numbers that are not finite."""
_MEDIA = ("multimodal_inputs", "multimodal_train_inputs")
_FLOAT_LISTS = ("rollout_log_probs", "teacher_log_probs", "opd_reverse_kl")


def write_samples(path: Path | str, samples: Iterable[Sample]) -> Path:
    """Write `samples` to the JSONL file `path`, replacing it in one step; folders are made. Images
    stay out; `multimodal_train_input_id` tells whether a prompt had any.

    Raises:
        DataError: a field holds what JSON can't, e.g. bytes; the message names sample and field.
        OSError: the file can't be written; an earlier one is as it was.
    """
    path = Path(path)
    data = b"".join(_line(sample) for sample in samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return path


def read_samples(path: Path | str) -> list[Sample]:
    """Read what `write_samples` wrote.

    Raises:
        DataError: the file is missing, or a line is no sample; the message has file and line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"samples can't be read from {path}: {error.strerror}") from error
    lines = raw.split(b"\n")
    return [_sample(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def _line(sample: Sample) -> bytes:
    plain = {
        name: value
        for name, value in sample.to_dict().items()
        if (default := _DEFAULTS.get(name, _NONE)) is not value
        and not _same(value, default)
        and not (name in _MEDIA and _has_pictures(value))
    }
    if sample.multimodal_train_inputs is not None and _MEDIA[1] not in plain:
        plain.setdefault("multimodal_train_input_id", "not saved")
    try:
        if _all_finite(plain):
            return orjson.dumps(plain, default=_as_list, option=_OPTIONS) + b"\n"
        return json.dumps(plain, default=_as_list, separators=(",", ":")).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        field, reason = _culprit(plain, error)
        raise DataError(
            f"sample {sample.index} of group {sample.group_index} can't be written as JSON: "
            f"field '{field}': {reason}. Keep such values out of the sample, or turn them into "
            "text, numbers, lists or objects (--no-save-samples, TOML: observe.save_samples, "
            "writes none)"
        ) from error


def _has_pictures(media: Any) -> bool:
    """Pictures or tensors: as text, once per sibling, they would dwarf everything else."""
    values = media.values() if isinstance(media, dict) else ()
    flat = [one for v in values for one in (v if isinstance(v, list | tuple) else (v,))]
    return any(hasattr(one, "getexif") or hasattr(one, "detach") for one in flat)


def _sample(line: bytes, where: str) -> Sample:
    try:
        plain = _parse(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise DataError(f"{where}: a sample (JSON object) is expected, got {type(plain).__name__}")
    try:
        sample = Sample.from_dict(plain)
        _check_lengths(sample)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: not a sample: {error}") from error
    return sample


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" in line or b"Infinity" in line:
            return json.loads(line)
        raise


def _check_lengths(sample: Sample) -> None:
    length = sample.response_length
    if type(length) is not int or not 0 <= length <= len(sample.tokens):
        raise ValueError(f"response_length {length!r} does not fit {len(sample.tokens)} tokens")
    if not all(type(token) is int for token in sample.tokens):
        raise ValueError("tokens are not all integers")
    for name in ("loss_mask", "rollout_log_probs"):
        values = getattr(sample, name)
        if values is not None and len(values) != length:
            raise ValueError(f"{len(values)} entries in {name}, but response_length is {length}")


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _all_finite(plain: Mapping[str, Any]) -> bool:
    for name, value in plain.items():
        if name in _FLOAT_LISTS and isinstance(value, list):
            finite = _finite_sum(value)
        else:
            finite = name in _NUMBER_LISTS or _finite(value)
        if not finite:
            return False
    return True


def _finite_sum(values: list[Any]) -> bool:
    """Quick check of a long list: one number that is not finite makes the sum so."""
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def _finite(value: Any) -> bool:
    if value is None or isinstance(value, str | int):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_finite(item) for item in value)
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return True


def _as_list(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{type(value).__name__} of length {len(value)} have no form in JSON")
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    for method in ("tolist", "to_dict", "model_dump"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} has no form in JSON")


def _culprit(plain: Mapping[str, Any], error: Exception) -> tuple[str, str]:
    """The first field that can't be written on its own, and why."""
    for name, value in plain.items():
        try:
            json.dumps(value, default=_as_list)
        except (TypeError, ValueError, RecursionError) as own:
            return name, str(own)
    return "?", str(error)
