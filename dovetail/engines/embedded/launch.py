"""How an embedded engine is started in a process of its own: `dovetail serve`, which answers in the
forms of SGLang."""

from __future__ import annotations

import os
from pathlib import Path

import dovetail
from dovetail.engines.launch import LaunchSettings, LaunchSpec

TOKEN_ENV = "DOVETAIL_ENGINE_TOKEN"


def launch(settings: LaunchSettings) -> LaunchSpec:
    """The command of one engine. `passthrough` has settings by their names here."""
    flags = {
        "hf_checkpoint": settings.model_dir,
        "router_host": settings.host,
        "router_port": settings.port,
        "rollout_max_context_len": settings.max_context_len,
        "rollout_max_response_len": 1,
        "dtype": settings.dtype,
        "device": settings.device,
        "engine_max_running": settings.max_running,
        "engine_memory_gb": settings.memory_gb,
        "trust_remote_code": settings.trust_remote_code,
        **settings.passthrough,
    }
    if settings.num_threads:
        flags["num_threads"] = settings.num_threads
    if settings.token is not None:
        flags["router_token_env"] = TOKEN_ENV
    argv = [settings.python, "-m", "dovetail", "serve"]
    for name, value in flags.items():
        argv += _written(name, value)
    package = str(Path(dovetail.__file__).parents[1])
    paths = [package, os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if settings.token is not None:
        env[TOKEN_ENV] = settings.token
    return LaunchSpec(argv, env)


def _written(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
