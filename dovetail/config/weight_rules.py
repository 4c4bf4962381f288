"""Impossible ways of carrying weights to engines, and settings of it without effect. As in
`dovetail.config.check` and `dovetail.config.notes`, whose rules and notes these are."""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig
from dovetail.types.weights import MEETINGS

_OF_FILES = (
    "custom_update_weight_post_write_path",
    "sglang_custom_pull_weights_pre_read_hook",
    "vllm_custom_pull_weights_pre_read_hook",
)


def apart(config: RunConfig) -> bool:
    """Whether engines have processes, and so weights, of their own."""
    return config.engine.in_processes or config.runtime.mode != "local"


def weight_rules(config: RunConfig) -> Iterator[str]:
    """Ways that can't be."""
    own, hooks = config.engine, config.hooks
    if not apart(config):
        return
    yield from _places(config)
    if not _ours(config):
        yield from _foreign(config)
    if own.update_weight_mode == "delta" and own.weight_transport != "disk":
        yield (
            "update_weight_mode 'delta' is of files on a disk: "
            f"{cure('weight_transport', 'disk')}, or leave {cure('update_weight_mode')} out"
        )
    if own.weight_transport == "cuda_ipc" and not _one_machine(config):
        yield (
            "weight_transport 'cuda_ipc' hands memory of this machine on, and engines are on "
            f"others; {cure('weight_transport', 'broadcast')}"
        )
    given = [leaf for leaf in _OF_FILES if getattr(hooks, leaf)]
    if given and own.weight_transport in MEETINGS:
        yield (
            f"{given[0]} is about files, and weight_transport '{own.weight_transport}' writes "
            f"none; {cure('weight_transport', 'disk')}"
        )
    if hooks.sglang_custom_pull_weights_pre_read_hook and own.rollout_engine == "sglang":
        yield (
            "SGLang calls no function before it reads weights; leave "
            f"{cure('sglang_custom_pull_weights_pre_read_hook')} out, or use "
            f"{cure('rollout_engine', 'embedded')}"
        )
    if hooks.vllm_custom_pull_weights_pre_read_hook:
        yield (
            "vLLM calls no function before it reads weights; leave "
            f"{cure('vllm_custom_pull_weights_pre_read_hook')} out, or use "
            f"{cure('rollout_engine', 'embedded')} with "
            f"{cure('sglang_custom_pull_weights_pre_read_hook')}"
        )


def _ours(config: RunConfig) -> bool:
    """Whether every engine is, or may be, a `dovetail serve`."""
    own = config.engine
    return own.rollout_engine not in ("vllm", "sglang") or (
        own.rollout_engine == "sglang" and bool(own.rollout_external_engine_addrs)
    )


def _one_machine(config: RunConfig) -> bool:
    return config.engine.all_local and config.runtime.actor_num_nodes == 1


def _places(config: RunConfig) -> Iterator[str]:
    own = config.engine
    if own.update_weight_disk_dir is not None or own.weight_transport in MEETINGS:
        return
    if own.weight_transport == "disk":
        yield (
            "weight_transport 'disk' has no place to write to; "
            f"{cure('update_weight_disk_dir', 'DIR')}"
        )
    elif not own.all_local:
        yield (
            "engines of other machines do not see this one's memory; give a directory for the "
            "weights that all of them see under the same path: "
            f"{cure('update_weight_disk_dir', 'DIR')}"
            + (f", or {cure('weight_transport', 'broadcast')}" if _ours(config) else "")
        )


def _foreign(config: RunConfig) -> Iterator[str]:
    own = config.engine
    kind = {"vllm": "vLLM", "sglang": "SGLang"}[own.rollout_engine]
    if own.weight_transport in MEETINGS:
        yield (
            f"{kind} takes no weights by {own.weight_transport} here, only as files; "
            f"{cure('weight_transport', 'auto')}, or {cure('rollout_engine', 'embedded')}"
        )
    if own.update_weight_mode == "delta":
        yield (
            f"{kind} reads whole weights only; leave {cure('update_weight_mode')} out, or use "
            f"{cure('rollout_engine', 'embedded')}"
        )
    if own.check_weight_update_equal:
        yield (
            f"{kind} keeps weights in a form of its own, which can't be compared with what was "
            f"sent; leave {cure('check_weight_update_equal')} out, or use "
            f"{cure('rollout_engine', 'embedded')}"
        )


def weight_notes(config: RunConfig) -> Iterator[str]:
    """One line for each setting without effect, or with one that may surprise."""
    own = config.engine
    if not apart(config):
        return
    if own.weight_transport in MEETINGS:
        if own.update_weight_disk_dir is not None:
            yield (
                f"update_weight_disk_dir {own.update_weight_disk_dir} does nothing: "
                f"weight_transport is {own.weight_transport}"
            )
        if own.rollout_num_engines == 1 and not own.rollout_external_engine_addrs:
            yield (
                f"weight_transport {own.weight_transport} keeps no weights for an engine that "
                "starts anew: when the only engine dies between two updates, the run ends"
            )
