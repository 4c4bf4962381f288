"""A model whose weights are sharded over ranks by FSDP2, and perhaps split by tensor parallelism.

A unit is a transformer layer, or what is left of the model. A unit's weights are whole on a rank
only while it runs, in the type in which passes compute; what lasts are float32 shards, which are
the master weights. Gradients are reduced in float32, as sums: losses are weighted over all rows
already.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dovetail.checkpoint.adapters import is_adapter
from dovetail.checkpoint.hf_names import turned
from dovetail.trainers.torch.context_parallel import ContextParallel
from dovetail.trainers.torch.gathering import gathered, pieces
from dovetail.trainers.torch.mesh import Mesh
from dovetail.trainers.torch.placement import GradFor, Grads
from dovetail.trainers.torch.tensor_parallel import check_splits, split_layer
from dovetail.types.errors import ConfigError

Fill = Callable[[Mapping[str, torch.nn.Parameter]], None]
"""Writes the values of these weights, which are whole and of a unit."""


class Sharded:
    """Shards `model` in place, over the ranks of `mesh`, all of which call this together.

    Args:
        dtype: in which passes compute. Weights that are trained are float32 shards all the same.
        trained: False: a frozen model, whose shards stay as they are.
        fill: for a model on the meta device: its units are made one after another, filled and
            sharded, so that no rank ever has two of them whole.
        cpu_offload: shards, gradients and optimizer are in CPU memory.
    """

    shards = True

    def __init__(
        self,
        model: Any,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        trained: bool = True,
        fill: Fill | None = None,
        cpu_offload: bool = False,
    ):
        self.model, self.mesh, self._dtype = model, mesh, dtype
        self.parallel, self.device, self.group = mesh.parallel, mesh.device, dist.group.WORLD
        self.context = None
        if mesh.cp is not None:
            self.context = ContextParallel(mesh.cp, mesh.cp_rank, mesh.cp_size)
        if mesh.tp is not None:
            check_splits(model, mesh.tp.size())
        self.trained = trained
        self._partial: list[str] = []
        self._how = _how(mesh, dtype, cpu_offload)
        self.layers = layers_of(model)
        for prefix, layer in self.layers.items():
            self._make(prefix, layer, fill)
            if mesh.tp is not None:
                self._partial += split_layer(model, prefix, layer, mesh.tp)
            fully_shard(layer, **self._how)
        if mesh.tp is not None and not any(_is_split(p) for p in model.parameters()):
            raise ConfigError(
                f"tensor parallel ranks would split nothing of {type(model).__name__} (adapters "
                "keep its matrices whole, or its plan is not known here); use "
                "--tensor-model-parallel-size 1 (TOML: trainer.tensor_model_parallel_size)"
            )
        self._make("", model, fill)
        fully_shard(model, **self._how)
        for module in self._units():
            # Sums, not means; and ranks that do not use a weight reduce it all the same.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.set_reduce_scatter_unused_params(True)
        model.hidden_of = types.MethodType(_hidden_of, model)
        register_fsdp_forward_method(model, "hidden_of")

    @property
    def dtype(self) -> torch.dtype:
        """See `Placed`."""
        return self._dtype

    def base_output(self, **inputs: Any) -> Any:
        """See `Placed`."""
        return self.model.hidden_of(**inputs)

    def passed(self) -> None:
        """See `Placed`. Whole weights that stayed would be stale after an optimizer step."""
        self.model.reshard()

    def broken(self) -> None:
        """See `Placed`."""
        self.model.reset_iter_state()

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Placed`."""
        if isinstance(tensor, DTensor):
            return tensor.to_local().detach()
        return tensor.detach()

    def storable(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """See `Placed`."""
        like = self.model.get_parameter(name)
        if not isinstance(like, DTensor):
            return local
        return DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    @contextlib.contextmanager
    def head_grads(
        self, grad_for: GradFor, params: Sequence[Any]
    ) -> Iterator[list[torch.Tensor | None]]:
        """See `Placed`. Context parallel ranks all have every scored token: one of them counts."""
        wanted = [
            param if param is not None and param.requires_grad and self.mesh.cp_rank == 0 else None
            for param in params
        ]
        grads = [
            None if p is None else torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            for p in wanted
        ]
        yield grads
        for param, grad in zip(wanted, grads, strict=True):
            if param is not None and grad is not None:
                own = grad.to(param.dtype)
                param.grad = own if param.grad is None else param.grad.add_(own)

    def add_up(self, grads: Grads) -> None:
        """See `Placed`. FSDP has reduced those of its shards."""
        for name, grad in grads.items():
            if not isinstance(self.model.get_parameter(name), DTensor):
                self.parallel.summed(grad)
        for name in self._partial:
            if name in grads:
                assert self.mesh.tp is not None
                dist.all_reduce(grads[name], group=self.mesh.tp.get_group())

    def norm(self, grads: Grads) -> float:
        """See `Placed`. Every part counts once, however many ranks have it; all ranks get the
        same, also where one of them has what is not finite."""
        kinds: list[list[torch.Tensor]] = [[], [], []]
        for name, grad in grads.items():
            kinds[self._kind(name)].append(grad)
        squares = [_squares(own) for own in kinds]
        sums = torch.tensor(squares, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self._shard_group)
        sums[0] /= dist.get_world_size(self._shard_group)
        if self.mesh.tp is not None:
            dist.all_reduce(sums, group=self.mesh.tp.get_group())
            sums[:2] /= self.mesh.tp.size()
        return float(sums.sum().sqrt())

    def kept(self) -> Iterator[torch.Tensor]:
        """See `Placed`."""
        self.passed()
        yield from (self.local(p) for p in self.model.parameters())
        yield from self.model.buffers()

    def named_tensors(self, most_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Placed`. Every rank gets whole tensors, each a copy, in the type in which passes
        compute. A unit at a time is gathered; one that is larger than `most_bytes` in pieces."""
        self.passed()
        for prefix, names in self._names().items():
            unit = self.model if not prefix else self.layers[prefix]
            whole = {name: self._blank(name) for name in names}
            parts = pieces(self.model, whole, most_bytes)
            if len(parts) == 1:
                yield from self._of_unit(unit, names)
                continue
            for part in parts:
                # Of its own, so that nothing of it is left when the next one is gathered.
                yield from self._of_piece(part)

    def _of_piece(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from turned(self.model, {name: self._gathered(name) for name in names}).items()

    def _of_unit(self, unit: Any, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        unit.unshard()
        try:
            for name, tensor in turned(self.model, {n: self._whole(n) for n in names}).items():
                # The unit's memory is given up below, whoever still looks at it.
                yield name, tensor.clone()
        finally:
            unit.reshard()

    def adapter_tensors(self) -> dict[str, torch.Tensor]:
        """See `Placed`."""
        return {
            name: param.full_tensor().detach() if isinstance(param, DTensor) else param.detach()
            for name, param in self.model.named_parameters()
            if is_adapter(name)
        }

    def _kind(self, name: str) -> int:
        """0: whole on every rank; 1: sharded; 2: split by tensor parallelism too."""
        param = self.model.get_parameter(name)
        if not isinstance(param, DTensor):
            return 0
        return 2 if _is_split(param) else 1

    @property
    def _shard_group(self) -> dist.ProcessGroup:
        own = self.mesh.sharding
        found: dist.ProcessGroup = own.get_group("shards")
        return found

    def _names(self) -> dict[str, list[str]]:
        """Of what a Hugging Face file has, by unit; tied weights once."""
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        own = {
            name: tensor for name, tensor in self.model.state_dict().items() if name not in ignored
        }
        kept = {
            name: self.model.get_parameter(name)
            for name, _ in self.model.named_parameters(remove_duplicate=False)
        }
        first = {id(param): name for name, param in kept.items() if name not in tied}
        found: dict[str, list[str]] = {prefix: [] for prefix in ("", *self.layers)}
        for name in own:
            if name in kept and first.setdefault(id(kept[name]), name) != name:
                continue
            found[self._unit_of(name)].append(name)
        return found

    def _unit_of(self, name: str) -> str:
        return next((prefix for prefix in self.layers if name.startswith(f"{prefix}.")), "")

    def _whole(self, name: str) -> torch.Tensor:
        tensor = self._named(name)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _gathered(self, name: str) -> torch.Tensor:
        return gathered(self._named(name), self.device, self._dtype)

    def _blank(self, name: str) -> torch.Tensor:
        """As `_gathered` gives it, without values."""
        like = self._named(name)
        kind = self._dtype if isinstance(like, DTensor) and like.is_floating_point() else like.dtype
        return torch.empty(like.shape, dtype=kind, device="meta")

    def _named(self, name: str) -> torch.Tensor:
        path, _, last = name.rpartition(".")
        found: torch.Tensor = getattr(self.model.get_submodule(path), last).detach()
        return found

    def _units(self) -> Iterator[FSDPModule]:
        yield self.model
        yield from self.layers.values()  # type: ignore[misc]

    def _make(self, prefix: str, unit: torch.nn.Module, fill: Fill | None) -> None:
        """Give a unit on the meta device its values, and trained weights their type."""
        made: dict[int, torch.nn.Parameter] = {}
        named: dict[str, torch.nn.Parameter] = {}
        for path, module in unit.named_modules():
            for name, param in list(module._parameters.items()):
                if param is None or isinstance(param, DTensor):
                    continue
                if id(param) not in made:
                    made[id(param)] = self._made(param)
                    full = ".".join(part for part in (prefix, path, name) if part)
                    named[full] = made[id(param)]
                setattr(module, name, made[id(param)])
        if fill is not None:
            fill(named)

    def _made(self, param: torch.nn.Parameter) -> torch.nn.Parameter:
        masters = self.trained and param.requires_grad
        kind = torch.float32 if masters else param.dtype
        if param.is_meta:
            data = torch.empty(param.shape, dtype=kind, device=self.device)
        else:
            data = param.detach().to(self.device, kind)
        return torch.nn.Parameter(data, requires_grad=param.requires_grad)


def layers_of(model: Any) -> dict[str, torch.nn.Module]:
    """The layers that are gathered one at a time, by name: what the model says must not be split,
    or the members of its lists of modules."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not _inside(name, found):
            found[name] = module
    if found:
        return found
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not _inside(name, found):
            found |= {f"{name}.{own}": child for own, child in module.named_children()}
    return found


def _is_split(param: torch.Tensor) -> bool:
    """By tensor parallelism."""
    return isinstance(param, DTensor) and "tp" in (param.device_mesh.mesh_dim_names or ())


def _inside(name: str, found: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{outer}.") for outer in found)


def _how(mesh: Mesh, dtype: torch.dtype, cpu_offload: bool) -> dict[str, Any]:
    low = None if dtype == torch.float32 else dtype
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    return {
        "mesh": mesh.sharding,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": offload if cpu_offload else OffloadPolicy(),
    }


def _hidden_of(model: Any, **inputs: Any) -> Any:
    return model.base_model(**inputs)


def _squares(grads: Sequence[torch.Tensor]) -> float:
    kept = [grad for grad in grads if grad.numel()]
    if not kept:
        return 0.0
    return float(torch.stack(torch._foreach_norm(kept)).double().square().sum())
