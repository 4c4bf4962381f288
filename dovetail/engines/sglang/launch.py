"""How an SGLang server is started: its command line and environment, from what the run knows and
from what the user says with `--sglang-*`.

Written from the arguments of sglang 0.5.23 (sglang/srt/arg_groups/fields); it has not started a
real one, which needs a GPU.
"""

from __future__ import annotations

from typing import Any

from dovetail.engines.flags import chosen, require_module, written
from dovetail.engines.known_flags import known_flags
from dovetail.engines.launch import LaunchSettings, LaunchSpec

MODULE = "sglang.launch_server"
_MODEL = "--hf-checkpoint (TOML: model.hf_checkpoint)"
_ONE_NODE = "nothing: a run starts engines on its own machine"
_HERE = "nothing: engines listen on this machine only"

_RUNS_OWN = {
    "model_path": _MODEL,
    "model": _MODEL,
    "config": "the --sglang-* settings themselves (TOML: [sglang])",
    "trust_remote_code": "--trust-remote-code (TOML: model.trust_remote_code)",
    "random_seed": "--rollout-seed (TOML: data.rollout_seed)",
    "context_length": "--rollout-max-context-len (TOML: rollout.rollout_max_context_len)",
    "enable_memory_saver": "nothing: it is on where the run takes its memory back",
    "enable_return_routed_experts": (
        "--use-rollout-routing-replay (TOML: algorithm.use_rollout_routing_replay)"
    ),
    "skip_server_warmup": "nothing: it is on",
    "skip_tokenizer_init": "nothing: stop strings need the tokenizer",
    "weight_version": "nothing: the run counts its weights",
    "sampling_defaults": "the sampling settings of the run, e.g. --rollout-top-p",
    "host": _HERE,
    "port": "nothing: a free one is taken",
    "api_key": _HERE,
    "admin_api_key": _HERE,
    "nnodes": _ONE_NODE,
    "node_rank": _ONE_NODE,
    "dist_init_addr": _ONE_NODE,
    "nccl_port": "nothing: a free one is taken",
    "grpc_mode": "nothing: engines are spoken to over HTTP",
    "smg_grpc_mode": "nothing: engines are spoken to over HTTP",
}
"""Settings of SGLang that the run sets itself, and what to use in their place."""


def launch(settings: LaunchSettings) -> LaunchSpec:
    """The command of one SGLang server.

    `passthrough` has the user's `--sglang-*` settings: they stand after the run's own, so that any
    of those that is no contract of the run (dtype, device, log_level, ...) can be changed. True is
    `--name`, False is `--no-name` where there is such a flag, else nothing, a list has all its
    values after the name, a table is JSON; `true` and `false` out of a flag count as truth values.

    Raises:
        ConfigError: `passthrough` has a setting that the run sets, or SGLang does not have.
        MissingExtraError: `settings.python` has no SGLang.
    """
    users = chosen("sglang", settings.passthrough, _RUNS_OWN)
    installed = require_module(settings.python, "sglang", "SGLang")
    known = known_flags("sglang")
    notes = known.check(users, installed)
    flags = {**_own_flags(settings), **users}
    argv = [settings.python, "-m", MODULE]
    for name, value in flags.items():
        argv += written(name, value, has_no=known.has_contrary(name))
    return LaunchSpec(argv, _environment(), notes=notes)


def _own_flags(settings: LaunchSettings) -> dict[str, Any]:
    return {
        "model_path": str(settings.model_dir),
        "host": settings.host,
        "port": settings.port,
        "device": settings.device,
        "dtype": settings.dtype,
        "context_length": settings.max_context_len,
        "random_seed": settings.seed,
        "trust_remote_code": settings.trust_remote_code,
        "enable_memory_saver": settings.sleeps,
        "enable_return_routed_experts": settings.return_routed_experts,
        "max_running_requests": settings.max_running or None,
        # Else the model's own top_k, top_p, ... would fill what a request leaves out.
        "sampling_defaults": "openai",
        "skip_server_warmup": True,
        "log_level_http": "warning",
    }


def _environment() -> dict[str, str]:
    return {
        # Logprobs after temperature, as the trainer has them.
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "false",
        # /health says that the server is up; /health_generate makes a token.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    }
