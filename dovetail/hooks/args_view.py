"""`args` for hooks: the whole configuration by flat names, as slime-style plugins read it."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from dovetail.config.aliases import ALIASES
from dovetail.config.engine_count import num_engines
from dovetail.config.passthrough import typed
from dovetail.config.run import RunConfig
from dovetail.hooks.custom_config import check_keys, custom_config
from dovetail.hooks.eval_datasets import eval_datasets_of
from dovetail.hooks.family_args import FACTS, FAMILY_ARGS, SETTABLE

_FALLS_BACK_TO = {
    "over_sampling_batch_size": "rollout_batch_size",
    "eval_reward_key": "reward_key",
    "eval_temperature": "rollout_temperature",
    "eval_top_p": "rollout_top_p",
    "eval_top_k": "rollout_top_k",
    "eval_max_response_len": "rollout_max_response_len",
    "eval_max_prompt_len": "rollout_max_prompt_len",
    "eval_input_key": "input_key",
    "eval_label_key": "label_key",
    "eval_tool_key": "tool_key",
    "eval_min_new_tokens": "rollout_min_new_tokens",
    "eval_max_context_len": "rollout_max_context_len",
    "eps_clip_high": "eps_clip",
    "ref_load": "hf_checkpoint",
    "wandb_group": "run_name",
    "num_gpus_per_node": "actor_num_gpus_per_node",
}


class ArgsView(argparse.Namespace):
    """Every leaf of the configuration as an attribute, and facts that are known only at run time.

    It is a copy: what a hook writes is seen by later hooks of the same process, never by the run.
    It copies, deep-copies and pickles. Leaves that default to another one are filled in. What
    plugins of the slime family read and no leaf stands for has the family's default, and the keys
    of `custom_config_path` and `plugin_args` are there too, and so are the settings of engine
    owners that are handed through (`args.sglang_tool_call_parser`).

    Raises:
        ConfigError: `custom_config_path` can't be read, or has a key that something else has.

    Example:
        >>> args = ArgsView(RunConfig(), rollout_id=3)
        >>> args.rollout_batch_size, args.rollout_id, getattr(args, "max_turns", 5)
        (8, 3, 5)
    """

    def __init__(
        self,
        config: RunConfig | None = None,
        passthrough: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        super().__init__()
        if config is not None:
            known = copy.deepcopy({**FAMILY_ARGS, **FACTS}) | _flat(config)
            self.__dict__.update(known)
            own = config.hooks.plugin_args
            taken = (known.keys() - SETTABLE) | own.keys()
            check_keys(own, "plugin_args (TOML: hooks.plugin_args)", known.keys() - SETTABLE)
            self.__dict__.update(copy.deepcopy(own))
            self.__dict__.update(custom_config(config.hooks.custom_config_path, taken))
        self.__dict__.update(typed(passthrough or {}))
        self.__dict__.update(facts)

    def learn(self, **facts: Any) -> None:
        """Set what has become known: the router's address, the step that the run starts at, ..."""
        self.__dict__.update(facts)

    def __getattr__(self, name: str) -> Any:
        # Only reached when normal lookup failed.
        near = [] if name.startswith("__") else get_close_matches(name, self.__dict__, n=1)
        own = (
            "; a name of your own comes from --custom-config-path (TOML: hooks.custom_config_path)"
        )
        hint = f"; did you mean {near[0]!r}?" if near else own
        raise AttributeError(f"args has no attribute {name!r}{hint}")


def _flat(config: RunConfig) -> dict[str, Any]:
    values = dict(_leaves(config))
    for name, other in _FALLS_BACK_TO.items():
        if values[name] is None:
            values[name] = values[other]
    values["global_batch_size"] = config.samples_per_optimizer_step
    values["eval_datasets"] = eval_datasets_of(config)
    # Their routers are the ones that have middleware.
    for family in ("slime", "miles"):
        values[f"use_{family}_router"] = bool(values["router_middleware_paths"])
    for foreign, alias in ALIASES.items():
        value = values[alias.leaf]
        if alias.negates:
            values[foreign] = not value
        else:
            values[foreign] = value if alias.constant is None else value == alias.constant
    runtime = config.runtime
    values["offload_train"], values["offload_rollout"] = runtime.trainer_rests, runtime.engines_rest
    if runtime.rollout_num_gpus is None:
        values["rollout_num_gpus"] = num_engines(config) * runtime.rollout_num_gpus_per_engine
    # Theirs bounds what a function of theirs has made ahead; it is unbounded unless asked for.
    values["max_weight_staleness"] = config.rollout.max_lag or None
    return values


def _leaves(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for section_name in type(config).model_fields:
        section = getattr(config, section_name)
        for name in type(section).model_fields:
            yield name, copy.deepcopy(getattr(section, name))
