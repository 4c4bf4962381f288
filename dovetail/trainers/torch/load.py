"""A sharded model out of a Hugging Face directory, without any rank ever having all of it.

Each rank makes one unit at a time, reads its weights, and keeps its shards. Where the names of the
files are not the model's own (experts that the model keeps in one tensor, say), transformers turns
them: rank 0 then reads the whole model into CPU memory and sends it, a weight at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dovetail.checkpoint import hf
from dovetail.checkpoint.weight_files import weight_files
from dovetail.config.leaves import cure
from dovetail.config.sections import ModelConfig, TrainerConfig
from dovetail.trainers.torch.lora import add_adapters, filling_adapters
from dovetail.trainers.torch.mesh import Mesh
from dovetail.trainers.torch.sharded import Fill, Sharded
from dovetail.types.errors import CheckpointError


def load_sharded(
    path: Path | str,
    mesh: Mesh,
    model: ModelConfig,
    trainer: TrainerConfig,
    *,
    trained: bool = True,
    adapted: bool = False,
) -> Sharded:
    """The model in directory `path` over the ranks of `mesh`, which all call this.

    Args:
        model: in which type passes compute, and whether activations are computed again; weights
            that are trained are float32 shards.
        trainer: where shards are, and the adapters.
        trained: False: frozen.
        adapted: low-rank adapters are trained instead of the weights, if `trainer` has a rank for
            them.

    Raises:
        ConfigError: `path` is no directory, has no usable config, or the model can't be split so.
        CheckpointError: the weights are missing, damaged, incomplete or of other shapes.
    """
    dtype: torch.dtype = getattr(torch, model.dtype)
    made = hf.load_skeleton(path, dtype, model.trust_remote_code, with_buffers=True)
    fill = fill_from(made, Path(path), dtype, model.trust_remote_code)
    if trained and model.gradient_checkpointing:
        made.activation_checkpointing_enable()
    if adapted and trainer.lora_rank:
        add_adapters(made, trainer, model.seed)
        fill = filling_adapters(fill, model.seed)
    sharded = Sharded(
        made,
        mesh,
        dtype=dtype,
        trained=trained,
        fill=fill,
        cpu_offload=trainer.fsdp_cpu_offload,
    )
    made.eval()
    return sharded


def fill_from(model: Any, directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> Fill:
    """What writes the values of `model`'s weights, out of the files or rank 0's copy of them."""
    source = _places(directory)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    names = {name: _in_files(name, source, tied) for name, _ in model.named_parameters()}
    if all(names.values()):
        return _from_files(directory, {name: str(own) for name, own in names.items()}, source)
    return _from_rank_0(directory, dtype, trust_remote_code)


def _places(directory: Path) -> dict[str, Path]:
    """Which file has which tensor."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in weight_files(directory, f"Use another {cure('hf_checkpoint')}"):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _in_files(name: str, source: Mapping[str, Path], tied: Mapping[str, str]) -> str | None:
    same = [name, tied.get(name), *(key for key, other in tied.items() if other == name)]
    return next((own for own in same if own in source), None)


def _from_files(directory: Path, names: Mapping[str, str], source: Mapping[str, Path]) -> Fill:
    from safetensors import safe_open

    @torch.no_grad()
    def fill(params: Mapping[str, torch.nn.Parameter]) -> None:
        with contextlib.ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in {source[names[name]] for name in params}
            }
            for name, param in params.items():
                tensor = opened[source[names[name]]].get_tensor(names[name])
                if tensor.shape != param.shape:
                    raise CheckpointError(
                        f"the weights in {directory} do not fit its config.json: {name} is "
                        f"{list(tensor.shape)}, expected {list(param.shape)}. Use another "
                        f"{cure('hf_checkpoint')}"
                    )
                param.copy_(tensor)

    return fill


def _from_rank_0(directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> Fill:
    sends = dist.get_rank() == 0
    whole = hf.load_model(directory, dtype, "cpu", trust_remote_code) if sends else None

    @torch.no_grad()
    def fill(params: Mapping[str, torch.nn.Parameter]) -> None:
        for name, param in params.items():
            if whole is not None:
                param.copy_(whole.get_parameter(name))
            dist.broadcast(param.data, 0)

    return fill
