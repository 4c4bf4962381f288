"""Impossible combinations of what makes the tokens, and settings of it without effect. As in
`dovetail.config.check` and `dovetail.config.notes`, whose rules and notes these are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.config.weight_rules import apart, weight_notes, weight_rules

_OF_EMBEDDED = ("engine_fused", "engine_cuda_graphs", "engine_kv_tokens")
_OF_STARTED = ("engine_python", "engine_max_running", "engine_memory_gb")
_OF_PROCESSES = (
    "engine_python",
    "engine_start_timeout_s",
    "weight_transport",
    "update_weight_disk_dir",
    "update_weight_mode",
    "update_weight_buffer_size",
    "check_weight_update_equal",
    "server_concurrency",
    "use_fault_tolerance",
    "rollout_health_check_interval",
    "rollout_health_check_timeout",
    "rollout_health_check_first_wait",
)
_OF_FLEETS = ("router_policy", "router_health_check_failure_threshold")


def engine_rules(config: RunConfig) -> Iterator[str]:
    """Engines that can't be started, reached, or given weights."""
    own = config.engine
    wrong = list(_external(config)) if own.rollout_external_engine_addrs else []
    yield from wrong
    if not wrong:
        yield from weight_rules(config)
    if own.in_processes and config.data.multimodal_keys:
        yield (
            "multimodal_keys gives prompts with images, which only the embedded engine of the "
            f"run's own process takes; {cure('rollout_engine', 'embedded')} and "
            f"{cure('rollout_num_engines', 1)}"
        )


def _external(config: RunConfig) -> Iterator[str]:
    own, leaf = config.engine, "rollout_external_engine_addrs"
    addrs = own.rollout_external_engine_addrs
    if own.rollout_engine == "embedded":
        yield (
            f"{leaf} names engines that run already, and rollout_engine 'embedded' is started by "
            f"the run; say what they are: {cure('rollout_engine', 'vllm')} or 'sglang', which "
            "`dovetail serve` speaks too"
        )
    wrong = [addr for addr, url in zip(addrs, own.external_urls, strict=True) if not _good(url)]
    if wrong:
        # What may be a password is never shown.
        shown = "one with credentials" if "@" in wrong[0] else repr(wrong[0])
        yield f"{leaf} has {shown}, which is no address; {cure(leaf, 'HOST:PORT')}"
    elif len(set(own.external_urls)) < len(addrs):
        yield f"{leaf} names an engine twice: {', '.join(addrs)}; {cure(leaf, 'HOST:PORT ...')}"
    variable = own.engine_token_env
    if variable is not None and not os.environ.get(variable):
        yield (
            f"engine_token_env names the environment variable {variable}, which is not set or "
            f"empty; put the engines' token there, or name another one: "
            f"{cure('engine_token_env', 'VARIABLE')}"
        )
    asked = own.rollout_num_engines
    if "rollout_num_engines" in own.model_fields_set and asked != len(addrs):
        yield (
            f"rollout_num_engines {asked} and {len(addrs)} addresses in {leaf} contradict each "
            f"other; leave {cure('rollout_num_engines')} out"
        )


def _good(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port is not None
    except ValueError:
        return False
    bare = not parts.path and not parts.query and "@" not in parts.netloc
    return named and bare and parts.scheme in ("http", "https")


def engine_notes(config: RunConfig) -> Iterator[str]:
    """One line for each setting without effect."""
    own = config.engine
    yield from _idle(config, ("join",), "a run has engines, `dovetail serve` joins one")
    yield from weight_notes(config)
    if not apart(config):
        yield from _idle(config, _OF_PROCESSES, "the engine is in the run's own process")
        yield from _idle(config, _OF_FLEETS, "there is one engine, in the run's own process")
        return
    if own.rollout_engine != "embedded":
        yield from _idle(config, _OF_EMBEDDED, f"rollout_engine is '{own.rollout_engine}'")
    if own.rollout_external_engine_addrs:
        yield from _idle(config, _OF_STARTED, "the engines run already")
    if own.weight_transport == "shared_memory" and own.all_local:
        yield from _idle(config, ("update_weight_disk_dir",), "weight_transport is shared_memory")


def _idle(config: RunConfig, leaves: Sequence[str], why: str) -> Iterator[str]:
    for section in (config.engine, config.router):
        for leaf in leaves:
            if leaf in section.model_fields_set:
                yield f"{leaf} {getattr(section, leaf)} does nothing: {why}"


def engine_owner(config: RunConfig) -> str | None:
    """The prefix of handed-through settings that the engines of this run read: `vllm` of
    `--vllm-max-num-seqs`. None: none are read."""
    own = config.engine
    if own.rollout_external_engine_addrs or own.rollout_engine == "embedded":
        return None
    return own.rollout_engine
