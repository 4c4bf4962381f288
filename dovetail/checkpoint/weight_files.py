"""Which files of a Hugging Face directory have its weights. Only safetensors, which no code can
hide in, are read."""

from __future__ import annotations

import json
from pathlib import Path

from dovetail.types.errors import CheckpointError

_INDEX = "model.safetensors.index.json"


def weight_files(directory: Path, cure: str) -> list[Path]:
    """The safetensors files of `directory`, each of them whole.

    Args:
        cure: last words of every message.

    Raises:
        CheckpointError: one is missing, damaged or of another kind.
    """
    single, index = directory / "model.safetensors", directory / _INDEX
    if single.is_file():
        names = {single.name}
    elif index.is_file():
        names = _shards(index, cure)
    elif list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise CheckpointError(
            f"{directory} has its weights as pickle files, which can run code when read; "
            f"save it again as safetensors (model.save_pretrained). {cure}"
        )
    else:
        raise CheckpointError(
            f"no weights in {directory}: neither model.safetensors nor {_INDEX}. {cure}"
        )
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{directory} lacks the weight file {file.name}. {cure}")
        _check_whole(file, cure)
    return files


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300].rstrip(".")


def _check_whole(file: Path, cure: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {first_line(error)}. {cure}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is damaged: {first_line(error)}. Get it again. {cure}"
        ) from error


def _shards(index: Path, cure: str) -> set[str]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except OSError as error:
        raise CheckpointError(f"{index} can't be read: {error.strerror}. {cure}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error!r}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}; only safetensors files beside it are read"
            )
    return names
