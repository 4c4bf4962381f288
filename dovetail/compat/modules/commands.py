"""`utils.external_utils.command_utils`: launch scripts that start a training run."""

from __future__ import annotations

import datetime
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["create_run_id", "exec_command", "execute_train"]


def execute_train(
    train_args: str,
    num_gpus_per_node: int | None = None,
    megatron_model_type: str | None = None,
    train_script: str = "train.py",
    before_ray_job_submit: Callable[[], Any] | None = None,
    extra_env_vars: Mapping[str, str] | None = None,
    **others: Any,
) -> None:
    """Run `dovetail train` with these flags in a process of its own, and wait for it.

    What only a cluster of theirs has (GPUs per node, Megatron's model file, a Ray job) is not
    needed.

    Raises:
        subprocess.CalledProcessError: its exit code is not 0.
    """
    if before_ray_job_submit is not None:
        before_ray_job_submit()
    command = [sys.executable, "-m", "dovetail", "train", *shlex.split(train_args)]
    environment = {name: str(value) for name, value in (extra_env_vars or {}).items()}
    subprocess.run(command, env={**os.environ, **environment}, check=True)


def exec_command(cmd: str, capture_output: bool = False) -> str | None:
    """Run a shell command, and give its output if asked for.

    Raises:
        subprocess.CalledProcessError: its exit code is not 0.
    """
    done = subprocess.run(["bash", "-c", cmd], check=True, capture_output=capture_output, text=True)
    return done.stdout if capture_output else None


def create_run_id() -> str:
    """A name for a run: date, time, and three digits."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%y%m%d-%H%M%S}-{random.randint(0, 999):03d}"
