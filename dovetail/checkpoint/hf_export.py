"""A Hugging Face directory out of tensors that come one after another, as trainer ranks give them.

At no time are more of them in memory than one file has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.hf import put_export

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FILE_BYTES = 2 << 30


def save_hf_tensors(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Any,
    path: Path | str,
    *,
    writes: bool = True,
    beside: Callable[[Path], None] | None = None,
    leaf: str = "save_hf",
) -> Path:
    """As `save_hf`, with these weights; `model` gives only the configuration, and may be a
    skeleton.

    Args:
        tensors: under the names of the files, such as `Backend.hf_tensors()`.
        writes: False on ranks that only take part in gathering the tensors.
        beside: writes more into the directory.
        leaf: the setting that named the place.

    Raises:
        ConfigError: something else is at `path`.
        CheckpointError: it can't be written; an earlier export is as it was.
    """
    if not writes:
        for _ in tensors:
            continue
        return Path(path).absolute()

    def write(aside: Path) -> None:
        aside.mkdir()
        model.config.save_pretrained(aside)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(aside)
        _write_files(aside, tensors)
        if beside is not None:
            beside(aside)

    return put_export(model, tokenizer, path, write, leaf)


def _write_files(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    sizes = [0]

    def flush() -> None:
        from safetensors.torch import save_file

        if held:
            save_file(held, directory / _part(len(files)), metadata={"format": "pt"})
            files.append(list(held))
            held.clear()
            sizes.append(0)

    for name, tensor in tensors:
        if sizes[-1] + tensor.nbytes > FILE_BYTES:
            flush()
        # A copy: the next tensor may be gathered into the same memory.
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        sizes[-1] += tensor.nbytes
    flush()
    _name(directory, files, sum(sizes))


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _name(directory: Path, files: list[list[str]], total: int) -> None:
    if len(files) == 1:
        (directory / _part(0)).rename(directory / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / _part(number)).rename(directory / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
