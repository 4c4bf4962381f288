"""How a vLLM server is started: its command line and environment, from what the run knows and from
what the user says with `--vllm-*`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.engines.flags import chosen, require_module, written
from dovetail.engines.known_flags import known_flags
from dovetail.engines.launch import LaunchSettings, LaunchSpec
from dovetail.engines.vllm import in_server
from dovetail.types.errors import ConfigError

MODULE = "vllm.entrypoints.openai.api_server"
"""The `vllm` command wants a distribution of that name, which the CPU build is not."""

_RUNS_OWN = {
    "model": "--hf-checkpoint (TOML: model.hf_checkpoint)",
    "model_tag": "--hf-checkpoint (TOML: model.hf_checkpoint)",
    "host": "nothing: engines listen on this machine only",
    "port": "nothing: a free one is taken",
    "uds": "nothing: engines are spoken to over HTTP",
    "headless": "nothing: engines are spoken to over HTTP",
    "max_model_len": "--rollout-max-context-len (TOML: rollout.rollout_max_context_len)",
    "seed": "--rollout-seed (TOML: data.rollout_seed)",
    "trust_remote_code": "--trust-remote-code (TOML: model.trust_remote_code)",
    "enable_return_routed_experts": (
        "--use-rollout-routing-replay (TOML: algorithm.use_rollout_routing_replay)"
    ),
    "logprobs_mode": (
        "nothing: it is raw_logprobs at --rollout-temperature 1, else processed_logprobs"
    ),
    "weight_transfer_config": "--weight-transport (TOML: engine.weight_transport)",
    "worker_extension_cls": "--weight-transport (TOML: engine.weight_transport)",
    "api_key": "nothing: engines listen on this machine only",
}
"""Settings of vLLM that the run sets itself, and what to use in their place."""


def launch(settings: LaunchSettings) -> LaunchSpec:
    """The command of one vLLM server.

    `passthrough` has the user's `--vllm-*` settings: they stand after the run's own, so that any
    of those that is no contract of the run (dtype, enforce_eager, kv_cache_memory_bytes,
    generation_config, ...) can be changed. True is `--name`, False `--no-name`, a list has all
    its values after the name, a table is JSON; `true` and `false` out of a flag count as truth
    values.

    Raises:
        ConfigError: `passthrough` has a setting that the run sets, or that vLLM does not have; or
            experts are to be recorded on a CPU, where vLLM can't.
        MissingExtraError: `settings.python` has no vLLM.
    """
    users = chosen("vllm", settings.passthrough, _RUNS_OWN)
    installed = require_module(settings.python, "vllm", "vLLM")
    known = known_flags("vllm")
    notes = known.check(users, installed)
    if settings.return_routed_experts and settings.device == "cpu":
        # "AuxOutput Connector requires Model Runner V2", which "requires Triton" (vLLM 0.32).
        raise ConfigError(
            "vLLM records routed experts on GPUs only; on a CPU leave "
            "--use-rollout-routing-replay (TOML: algorithm.use_rollout_routing_replay) out, or use "
            "--rollout-engine embedded (TOML: engine.rollout_engine)"
        )
    flags = {**_own_flags(settings), **users}
    argv = [settings.python, "-m", MODULE]
    for name, value in flags.items():
        argv += written(name, value, has_no=known.has_contrary(name))
    return LaunchSpec(argv, _environment(settings, flags), notes=notes)


def logprobs_mode(temperature: float) -> str:
    """vLLM's `--logprobs-mode` whose figures are `log_softmax(logits / temperature)`.

    raw_logprobs are those of the logits as they come out of the model; processed_logprobs those
    after temperature, min_p, top_k and top_p, so that what these cut away is not in the sum.
    """
    return "raw_logprobs" if temperature in (0.0, 1.0) else "processed_logprobs"


def _own_flags(settings: LaunchSettings) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model": str(settings.model_dir),
        "host": settings.host,
        "port": settings.port,
        "max_model_len": settings.max_context_len,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "logprobs_mode": logprobs_mode(settings.temperature),
        # Any number of candidates per place: who asks is on this machine.
        "max_logprobs": -1,
        # Else the model's own top_k, top_p, ... would fill what a request leaves out.
        "generation_config": "vllm",
        "enable_prompt_tokens_details": True,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids out
        # Requests that are passed on: calls of tools as the router reads them.
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "disable_uvicorn_access_log": True,
        "weight_transfer_config": {"backend": in_server.BACKEND},
        "worker_extension_cls": in_server.EXTENSION,
    }
    if settings.max_running:
        flags["max_num_seqs"] = settings.max_running
    if settings.trust_remote_code:
        flags["trust_remote_code"] = True
    if settings.return_routed_experts:
        flags["enable_return_routed_experts"] = True
    if settings.device == "cpu":
        flags["enforce_eager"] = True
        flags["kv_cache_memory_bytes"] = int(settings.memory_gb * 1e9)
        flags["distributed_executor_backend"] = "uni"
    elif settings.sleeps:
        flags["enable_sleep_mode"] = True
    return flags


def _environment(settings: LaunchSettings, flags: Mapping[str, Any]) -> dict[str, str]:
    paths = [str(Path(in_server.__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # Routes that pause, take weights, sleep; the server listens on this machine only.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Clients name models as they like, at every engine; there is just one.
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "1",
    }
    if settings.device != "cpu":
        return env
    # By default vLLM keeps a core for its front end and binds every server to the first others.
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if flags["distributed_executor_backend"] == "uni":
        # One process less, which would import everything once more: 12 s on a slow machine.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if flags["enforce_eager"]:
        # One function of the sampler is compiled in spite of enforce_eager, for half a minute.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env
