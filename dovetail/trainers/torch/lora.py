"""Training low-rank adapters instead of the weights (peft).

The reference is the same model with its adapters off: no second copy.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dovetail.checkpoint.adapters import FOLDER, LOW, is_adapter, plain_name, save_adapter
from dovetail.config.leaves import cure
from dovetail.config.sections import TrainerConfig
from dovetail.trainers.torch.placement import Placed
from dovetail.types.errors import ConfigError

Fill = Callable[[Mapping[str, torch.nn.Parameter]], None]


def add_adapters(model: Any, config: TrainerConfig, seed: int) -> None:
    """Give `model` adapters, in place and in its type, and freeze all else.

    A new adapter changes nothing: B is 0, and A is drawn from `seed` and its name, so that it is
    the same on every rank and in every layout.

    Raises:
        ConfigError: peft is not installed, or the model has no module of these names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "lora_rank needs peft: pip install 'dovetail-rl[lora]', or leave "
            f"{cure('lora_rank')} out"
        ) from error
    wanted: str | list[str] = config.target_modules
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if wanted == ["all-linear"] else wanted,
    )
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigError(
            f"{type(model).__name__} has no modules for target_modules {config.target_modules}: "
            f"{str(error).splitlines()[0]}; name ends of its modules' names: "
            f"{cure('target_modules', 'q_proj v_proj')}"
        ) from error
    own = json.loads(json.dumps(settings.to_dict(), default=_plain))
    model.dovetail_adapters = {key: value for key, value in own.items() if value is not None}
    for name, param in model.named_parameters():
        param.requires_grad_(is_adapter(name))
        if is_adapter(name):
            param.data = param.data.to(model.dtype)
            if not param.is_meta:
                _draw(name, param, seed)


def filling_adapters(fill: Fill, seed: int) -> Fill:
    """What fills a model with adapters, where `fill` fills it without."""

    def both(params: Mapping[str, torch.nn.Parameter]) -> None:
        fill({plain_name(name): p for name, p in params.items() if not is_adapter(name)})
        for name, param in params.items():
            if is_adapter(name):
                _draw(name, param, seed)

    return both


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model as it was before it got its adapters."""
    layers = _layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def scaling_of(model: Any) -> float | None:
    """How often adapters count; None without them."""
    layers = _layers(model)
    return float(layers[0].scaling["default"]) if layers else None


def adapter_export(own: Placed) -> Callable[[Path], None] | None:
    """What writes a model's adapters into an export, gathered from all ranks, which all call this;
    None without adapters."""
    settings = getattr(own.model, "dovetail_adapters", None)
    if settings is None:
        return None
    tensors = {name: tensor.cpu() for name, tensor in own.adapter_tensors().items()}
    return lambda directory: save_adapter(directory / FOLDER, settings, tensors)


def dropping(model: Any) -> None:
    """Let adapters drop some of their inputs out, as they shall in training passes."""
    for layer in _layers(model):
        layer.lora_dropout.train()


def _layers(model: Any) -> list[Any]:
    if not hasattr(model, "dovetail_adapters"):
        return []
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def _draw(name: str, param: torch.nn.Parameter, seed: int) -> None:
    """As peft: A uniform within 1 / sqrt(inputs), B zero."""
    if LOW not in name:
        param.zero_()
        return
    draw = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(param.shape[1])
    param.copy_((torch.rand(param.shape, generator=draw) * 2 - 1) * bound)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
