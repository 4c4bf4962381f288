"""`utils.external_utils.command_utils`: launch scripts written in Python start our training."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.compat.modules.misc import exec_command

__all__ = [
    "ExecuteTrainConfig",
    "create_run_id",
    "exec_command",
    "execute_train",
    "get_default_wandb_args",
    "save_to_temp_file",
]


@dataclass
class ExecuteTrainConfig:
    """What launch scripts may set of the machines; one machine and no core dumps here."""

    cuda_core_dump: bool = False
    num_nodes: int = 1
    extra_env_vars: str = ""
    """A JSON object, or NAME=VALUE words."""


def execute_train(
    train_args: str,
    num_gpus_per_node: int | None = None,
    megatron_model_type: str | None = None,
    train_script: str = "train.py",
    before_ray_job_submit: Callable[[], Any] | None = None,
    extra_env_vars: Mapping[str, Any] | None = None,
    config: ExecuteTrainConfig | None = None,
) -> None:
    """Run `dovetail train` with the flags of `train_args`, and wait for it.

    The model comes from --hf-checkpoint and the devices are those of this machine, so GPU count,
    Megatron's model type and the script are not needed.

    Raises:
        subprocess.CalledProcessError: the run failed; it has told why.
    """
    if before_ray_job_submit is not None:
        before_ray_job_submit()
    own = _variables(config.extra_env_vars if config is not None else "")
    more = {name: str(value) for name, value in {**(extra_env_vars or {}), **own}.items()}
    command = [sys.executable, "-m", "dovetail", "train", *shlex.split(train_args)]
    subprocess.run(command, check=True, env={**os.environ, **more})


def _variables(text: str) -> dict[str, str]:
    if text.lstrip().startswith("{"):
        return {name: str(value) for name, value in json.loads(text).items()}
    return dict(word.split("=", 1) for word in shlex.split(text))


def create_run_id() -> str:
    """A name by the time, for a run."""
    return time.strftime("%y%m%d-%H%M%S") + f"-{time.time_ns() % 1000:03d}"


def get_default_wandb_args(
    test_file: str, run_name_prefix: str | None = None, run_id: str | None = None
) -> str:
    """Flags that log to Weights & Biases, where a key for it is set; else none."""
    if not os.environ.get("WANDB_API_KEY"):
        return ""
    name = "_".join(filter(None, (run_name_prefix, run_id or create_run_id())))
    return f"--use-wandb --wandb-project {Path(test_file).stem} --wandb-group {name} "


def save_to_temp_file(text: str, ext: str) -> str:
    """The path of a new file with this text."""
    with tempfile.NamedTemporaryFile("w", suffix=f".{ext}", delete=False) as file:
        file.write(text)
    return file.name
