"""`--megatron-*`: the user's settings onto Megatron's configuration classes.

The names are kept in `fields.txt`, made by `tests/megatron_fields.py`, so that a misspelt one is
told in seconds and without Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any

from dovetail.config.passthrough import typed
from dovetail.types.errors import ConfigError


class Target(StrEnum):
    """Whose field a setting is."""

    TRANSFORMER = "TransformerConfig"
    OPTIMIZER = "OptimizerConfig"
    DDP = "DistributedDataParallelConfig"


_OF_THE_RUN: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "sequence_parallel",
            "use_distributed_optimizer",
            "lr",
            "min_lr",
            "adam_beta1",
            "adam_beta2",
            "adam_eps",
            "weight_decay",
            "clip_grad",
        ),
        "own",
    ),
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "params_dtype": "--dtype",
    "bf16": "--dtype",
    "moe_enable_routing_replay": "--use-routing-replay or --use-rollout-routing-replay",
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "ffn_hidden_size",
            "num_moe_experts",
            "moe_router_topk",
            "moe_ffn_hidden_size",
        ),
        "nothing: it is the model's",
    ),
    "fp16": "nothing: weights are bfloat16 or float32, --dtype",
    "calculate_per_token_loss": "nothing: the weights of a loss are those of the whole step",
    "variable_seq_lengths": "nothing: micro-batches are packed lines of any length",
    "moe_aux_loss_coeff": "nothing: no auxiliary loss is added to the algorithm's",
    "mtp_num_layers": "nothing: there is no loss for predicting several tokens",
    "use_megatron_fsdp": "nothing: --train-backend torch shards by FSDP2",
    **dict.fromkeys(
        ("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        "nothing: weights are whole whenever somebody reads them",
    ),
    "pipeline_model_parallel_layout": "nothing: stages are of one size",
}
"""What the run sets itself, and what to use in its place."""


@cache
def _fields() -> tuple[str, Mapping[str, frozenset[Target]]]:
    file = resources.files("dovetail.trainers.megatron").joinpath("fields.txt")
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    found: dict[str, set[Target]] = {}
    for line in lines:
        name, *owners = line.split()
        found[name] = {Target(owner) for owner in owners}
    return first.split()[2].rstrip(","), {name: frozenset(own) for name, own in found.items()}


def check(passed: Mapping[str, Any]) -> None:
    """Refuse names that no configuration class of Megatron's has, or that the run sets itself.

    `passed`: by names without prefix.

    Raises:
        ConfigError: all of them, one a line.
    """
    said = [line for name in passed for line in _wrong(name.replace("-", "_"))]
    if said:
        raise ConfigError("\n".join(said))


def _wrong(name: str) -> Iterator[str]:
    flag = f"--megatron-{name.replace('_', '-')} (TOML: megatron.{name})"
    version, fields = _fields()
    if name in _OF_THE_RUN:
        instead = _OF_THE_RUN[name]
        if instead == "own":
            instead = f"--{name.replace('_', '-')}"
        if instead.startswith("nothing: "):
            yield f"{flag} is set by the run itself; leave it out: {instead[9:]}"
        else:
            yield f"{flag} is set by the run itself; use {instead} instead"
    elif name not in fields:
        near = get_close_matches(name, sorted(fields), n=1)
        hint = (
            f"did you mean --megatron-{near[0].replace('_', '-')}?"
            if near
            else "its settings are the fields of TransformerConfig, OptimizerConfig and "
            "DistributedDataParallelConfig"
        )
        yield f"{flag}: megatron-core {version} has no such setting; {hint}"


def settings_of(passed: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Those of the user's settings that are fields of one class, flags' text as numbers and truth
    values. A name that several classes have goes to each.

    Raises:
        ConfigError: see `check`.
    """
    check(passed)
    own = {name.replace("-", "_"): value for name, value in passed.items()}
    return typed({name: v for name, v in own.items() if target in _fields()[1][name]})


def transformer_settings(passed: Mapping[str, Any]) -> dict[str, Any]:
    """See `settings_of`; the name of an attention backend as Megatron's own."""
    found = settings_of(passed, Target.TRANSFORMER)
    if isinstance(found.get("attention_backend"), str):
        from megatron.core.transformer.enums import AttnBackend

        try:
            found["attention_backend"] = AttnBackend[found["attention_backend"]]
        except KeyError as error:
            raise ConfigError(
                f"--megatron-attention-backend {found['attention_backend']!r}: expected one of "
                f"{', '.join(one.name for one in AttnBackend)}"
            ) from error
    return found
