"""Hugging Face weights into Megatron's modules and back.

Which weights make which, and how, is mbridge's tables; which rank has which part is found here, in
both directions, so that expert and other tensor parallelism may differ, and layers may be
Transformer Engine's or megatron-core's own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core.bridge import Bridge
from mbridge.models import LLaMABridge, Qwen2Bridge, Qwen3Bridge, Qwen3MoEBridge
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from safetensors import SafetensorError, safe_open

from dovetail.checkpoint.weight_files import weight_files
from dovetail.trainers.data_parallel import told_in
from dovetail.trainers.megatron.architecture import is_tied, padded_vocab
from dovetail.types.errors import CheckpointError

_BRIDGES: dict[str, type[Bridge]] = {
    "llama": LLaMABridge,
    "qwen2": Qwen2Bridge,
    "qwen3": Qwen3Bridge,
    "qwen3_moe": Qwen3MoEBridge,
}
_LAYER = re.compile(r"(layers\.)(\d+)\.")
_LAYER_NORM = re.compile(r"(layers\.\d+\.)input_layernorm\.weight")
_EXPERT = re.compile(r"local_experts\.(\d+)\.(linear_fc\d)\.weight")
_GROUPED = re.compile(r"(\.experts\.linear_fc\d\.weight)(\d+)$")
_CURE = "Give a directory in Hugging Face form to --hf-checkpoint (TOML: model.hf_checkpoint)"


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's parameter: its name in the whole model as Transformer Engine's modules have it, and
    how it is split."""

    name: str
    shape: tuple[int, ...]
    split: int | None
    """Along which dimension; None: it is whole."""
    expert: int | None
    """Number of the expert among those of its rank."""


class Weights:
    """Between the modules of this rank and whole tensors under Hugging Face names."""

    def __init__(self, config: TransformerConfig, hf_config: Any, dtype: torch.dtype):
        self.config, self.dtype = config, dtype
        self.bridge = _bridge(config, hf_config, dtype)

    @torch.no_grad()
    def load(self, chunks: Sequence[Any], directory: Path | str) -> None:
        """Read this rank's part of a Hugging Face directory.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        files = _Files(Path(directory))
        for chunk in chunks:
            for part, parameter in self._parts(chunk):
                name = self._global(part, parallel_state.get_expert_model_parallel_rank())
                found = [
                    files.get(one) for one in self.bridge._weight_name_mapping_mcore_to_hf(name)
                ]
                try:
                    whole = self.bridge._weight_to_mcore_format(name, found)
                    own = self._own(part, whole)
                except (AssertionError, RuntimeError) as error:
                    raise _misfit(directory, name, error) from error
                if own.shape != parameter.shape:
                    raise _misfit(
                        directory, name, f"{list(own.shape)}, not {list(parameter.shape)}"
                    )
                parameter.copy_(own)

    @torch.no_grad()
    def tensors(self, chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, whole, on every rank; one at a time. All ranks iterate together."""
        group = parallel_state.get_pipeline_model_parallel_group()
        own = [pair for chunk in chunks for pair in self._parts(chunk)]
        said = told_in(group, [dataclasses.astuple(part) for part, _ in own])
        told = [[Part(name, tuple(shape), *how) for name, shape, *how in parts] for parts in said]
        seen: set[str] = set()
        for stage, number in ((s, n) for s, parts in enumerate(told) for n in range(len(parts))):
            tensor = own[number][1].detach() if stage == group.rank() else None
            for one, value in self._converted(told[stage][number], tensor, stage, group):
                if one not in seen:
                    seen.add(one)
                    yield one, value

    def _converted(
        self, part: Part, tensor: torch.Tensor | None, stage: int, group: dist.ProcessGroup
    ) -> Iterator[tuple[str, torch.Tensor]]:
        source = dist.get_global_rank(group, stage)
        for name, whole in self._whole(part, tensor, source, group):
            yield from zip(*self.bridge._weight_to_hf_format(name, whole), strict=True)

    def _parts(self, chunk: Any) -> Iterator[tuple[Part, torch.Tensor]]:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for local, parameter in chunk.named_parameters():
            name = _LAYER.sub(lambda found: f"{found[1]}{numbers[int(found[2])]}.", local)
            if not self.config.num_moe_experts:
                name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
            name = _LAYER_NORM.sub(r"\1self_attention.linear_qkv.layer_norm_weight", name)
            expert = None
            if found := _EXPERT.search(name):
                expert = int(found[1])
                name = name.replace(found[0], f"{found[2]}.weight")
            elif found := _GROUPED.search(name):
                expert = int(found[2])
                name = name[: found.start()] + found[1]
            split = parameter.partition_dim if parameter.tensor_model_parallel else None
            yield Part(name, tuple(parameter.shape), split, expert), parameter

    def _global(self, part: Part, rank: int) -> str:
        if part.expert is None:
            return part.name
        size = parallel_state.get_expert_model_parallel_world_size()
        return f"{part.name}{part.expert + rank * (self.config.num_moe_experts // size)}"

    def _splitting(self, part: Part) -> dist.ProcessGroup:
        if part.expert is None:
            return parallel_state.get_tensor_model_parallel_group()
        return parallel_state.get_expert_tensor_parallel_group()

    def _own(self, part: Part, whole: torch.Tensor) -> torch.Tensor:
        group = self._splitting(part)
        if part.split is None or group.size() == 1:
            return whole
        halves = whole.chunk(2) if ".linear_fc1.weight" in part.name else (whole,)
        return torch.cat([one.chunk(group.size(), part.split)[group.rank()] for one in halves])

    def _whole(
        self, part: Part, tensor: torch.Tensor | None, source: int, group: dist.ProcessGroup
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Of an expert's part, those of the ranks that have other experts too."""
        if group.size() > 1:
            if tensor is None:
                tensor = torch.empty(part.shape, dtype=self.dtype, device=self._device())
            tensor = tensor.contiguous()
            dist.broadcast(tensor, source, group=group)
        assert tensor is not None
        if part.expert is None:
            yield part.name, self._merged(part, tensor)
            return
        experts = parallel_state.get_expert_model_parallel_group()
        for rank, one in enumerate(_gathered(tensor, experts)):
            yield self._global(part, rank), self._merged(part, one)

    def _merged(self, part: Part, tensor: torch.Tensor) -> torch.Tensor:
        if part.split is None:
            return tensor
        parts = _gathered(tensor, self._splitting(part))
        if ".linear_fc1.weight" not in part.name:
            return torch.cat(parts, part.split) if len(parts) > 1 else tensor
        gates, ups = zip(*(one.chunk(2) for one in parts), strict=True)
        return torch.cat([*gates, *ups])

    def _device(self) -> torch.device:
        return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def _gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


class _Files:
    """Tensors of a Hugging Face directory by name."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.place: dict[str, Path] = {}
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            named = json.loads(index.read_text())["weight_map"]
            self.place = {name: directory / file for name, file in named.items()}
        else:
            for file in weight_files(directory, _CURE):
                with safe_open(file, framework="pt") as opened:
                    self.place.update(dict.fromkeys(opened.keys(), file))
        self.opened: dict[Path, Any] = {}

    def get(self, name: str) -> torch.Tensor:
        """One of them."""
        try:
            file = self.place[name]
            if file not in self.opened:
                self.opened[file] = safe_open(file, framework="pt").__enter__()
            found: torch.Tensor = self.opened[file].get_tensor(name)
            return found
        except (KeyError, OSError, SafetensorError) as error:
            raise _misfit(self.directory, name, "it is missing or damaged") from error


def _misfit(directory: Path | str, name: str, problem: Any) -> CheckpointError:
    return CheckpointError(
        f"the weights in {directory} do not fit its config.json: {name}: {problem}. {_CURE}"
    )


def _bridge(config: TransformerConfig, hf_config: Any, dtype: torch.dtype) -> Bridge:
    base = _BRIDGES[hf_config.model_type]
    direct = dict(base._DIRECT_MAPPING)
    if is_tied(hf_config):
        # A stage with a head and no embedding has a copy of it.
        direct["output_layer.weight"] = "model.embed_tokens.weight"

    class Tables(base):  # type: ignore[misc, valid-type]
        # A dictionary of its own: mbridge changes that of its class.
        _DIRECT_MAPPING = direct

        def _build_config(self) -> TransformerConfig:
            return config

        def _adjust_mapping_for_shared_weights(self) -> None:
            return None

    bridge = Tables(hf_config, dtype=dtype, make_vocab_size_divisible_by=1)
    bridge.vocab_size = hf_config.vocab_size
    bridge.padded_vocab_size = padded_vocab(hf_config.vocab_size, config.tensor_model_parallel_size)
    return bridge
