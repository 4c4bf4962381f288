"""The engines of a run that live in other processes: how many, of which kind, whose weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint import hf
from dovetail.checkpoint.hf_names import named_tensors, num_bytes
from dovetail.config.engine_count import num_engines
from dovetail.config.passthrough import handed
from dovetail.config.run import RunConfig
from dovetail.engines.interpreter import interpreter
from dovetail.engines.launch import ClientSettings, LaunchSettings
from dovetail.engines.process import HOST
from dovetail.engines.table import EngineRow, engine_row, load
from dovetail.runtime.fleet import EngineSpec, Fleet, PoolSettings
from dovetail.runtime.health import HealthSettings
from dovetail.transport.place import LOOPBACK, Wanted
from dovetail.transport.sender import Sender, make_sender

if TYPE_CHECKING:
    import torch

    from dovetail.run.models import Models
    from dovetail.run.on_ray import OnRay


def make_fleet(
    config: RunConfig,
    models: Models,
    passthrough: dict[str, Any],
    on_ray: OnRay | None = None,
    post_write: Callable[..., object] | None = None,
) -> Fleet:
    """The engines of a run, none of them started; `on_ray`: their processes live there.

    Args:
        post_write: called with the directory of each version that is written, and the engines'
            addresses, before any of them learns of it.

    Raises:
        DovetailError: an engine's own settings are wrong, or it is not installed.
    """
    settings = config.engine
    row = engine_row(settings.rollout_engine)

    def written(directory: Path) -> None:
        if post_write is not None:
            post_write(str(directory), list(fleet.pool.workers))

    fleet = Fleet(
        _specs(row, config, models, passthrough, on_ray),
        pool=PoolSettings(
            policy=config.router.router_policy,
            per_worker=settings.server_concurrency,
            queue_size=config.router.router_queue_size,
            request_timeout_s=config.router.router_request_timeout_s,
            failure_threshold=config.router.router_health_check_failure_threshold,
        ),
        health=HealthSettings(
            interval_s=settings.rollout_health_check_interval,
            timeout_s=settings.rollout_health_check_timeout,
            first_wait_s=settings.rollout_health_check_first_wait,
            failure_threshold=config.router.router_health_check_failure_threshold,
            start_timeout_s=settings.engine_start_timeout_s,
            waits_for_attached="engine_start_timeout_s" in settings.model_fields_set,
            repairs=settings.use_fault_tolerance,
        ),
        store=(lambda: weights_store(models, None, written)) if on_ray is None else on_ray.weights,
        connect=functools.partial(_connect, row, models),
    )
    return fleet


def weights_of(models: Models) -> Callable[[], Iterable[tuple[str, torch.Tensor]]]:
    """Makes iterators over the policy's weights under their Hugging Face names."""
    return lambda: named_tensors(models.model)


def _specs(
    row: EngineRow,
    config: RunConfig,
    models: Models,
    passthrough: dict[str, Any],
    on_ray: OnRay | None,
) -> list[EngineSpec]:
    client = functools.partial(_client, load(row.client), models)
    urls = config.engine.external_urls
    if urls:
        return [
            EngineSpec(f"engine {number} ({row.name} at {url})", client, url=url)
            for number, url in enumerate(urls)
        ]
    launch = functools.partial(_launch, row, config, models, passthrough)
    # What is wrong with the settings of the engine's own is told before anything takes long.
    launch(0)
    names = [f"engine {number} ({row.name})" for number in range(len(models.plan.engines))]
    if on_ray is None:
        return [EngineSpec(name, client, launch=launch) for name in names]

    def there(number: int, name: str) -> EngineSpec:
        assert on_ray is not None
        return EngineSpec(
            name,
            lambda url: client(url, on_ray.token(number)),
            launch=lambda port: launch(port, on_ray.host(number), on_ray.token(number)),
            home=lambda: on_ray.seat(number),
        )

    return [there(number, name) for number, name in enumerate(names)]


def _connect(row: EngineRow, models: Models, url: str, dialect: str | None) -> Any:
    """What speaks to an engine that joins a running fleet."""
    if dialect is not None:
        row = engine_row(dialect)
    return _client(load(row.client), models, url)


def _client(
    make: Callable[..., Any], models: Models, url: str, own_token: str | None = None
) -> Any:
    config = models.config
    variable = config.engine.engine_token_env
    named = None if variable is None else os.environ.get(variable)
    return make(
        url,
        ClientSettings(
            max_context_len=models.context_len,
            vocab_size=int(models.model.config.get_text_config().vocab_size),
            eos_token_ids=hf.eos_token_ids(models.model, models.tokenizer),
            tokenizer=models.tokenizer,
            request_timeout_s=config.router.router_request_timeout_s,
            model_dir=Path(str(config.model.hf_checkpoint)),
            token=own_token or named,
        ),
    )


def _launch(
    row: EngineRow,
    config: RunConfig,
    models: Models,
    passthrough: dict[str, Any],
    port: int,
    host: str = HOST,
    token: str | None = None,
) -> Any:
    settings = config.engine
    own = {leaf: getattr(settings, leaf) for leaf in row.leaves}
    before_reading = config.hooks.sglang_custom_pull_weights_pre_read_hook
    if before_reading is not None and row.path is not None:
        own["sglang_custom_pull_weights_pre_read_hook"] = before_reading
    return load(row.launch)(
        LaunchSettings(
            model_dir=Path(str(config.model.hf_checkpoint)).resolve(),
            port=port,
            host=host,
            token=token,
            max_context_len=models.context_len,
            python=interpreter(row.name, settings.engine_python),
            device=models.plan.device.partition(":")[0],
            dtype=config.model.dtype,
            temperature=config.rollout.rollout_temperature,
            max_running=settings.engine_max_running,
            memory_gb=settings.engine_memory_gb,
            seed=config.data.rollout_seed,
            return_routed_experts=config.algorithm.use_rollout_routing_replay,
            sleeps=config.runtime.engines_rest,
            trust_remote_code=config.model.trust_remote_code,
            # While they decode, the trainer rests.
            num_threads=max(1, models.plan.num_threads // max(1, num_engines(config))),
            passthrough={**own, **handed(passthrough, row.name)},
        )
    )


def weights_store(
    models: Models,
    address: str | None = None,
    written: Callable[[Path], None] | None = None,
) -> Sender:
    """What carries the weights of `models` to the engines.

    Args:
        address: of this machine, where some engines are on others; None: all are here.
        written: called with the directory of each version.

    Raises:
        ConfigError: they have no place.
    """
    settings = models.config.engine
    disk = settings.update_weight_disk_dir
    wanted = Wanted(
        transport=settings.weight_transport,
        disk_dir=None if disk is None else Path(disk),
        num_bytes=num_bytes(models.model),
        bucket_bytes=settings.update_weight_buffer_size,
        local=settings.all_local and address is None,
        # SGLang's own readers lock nothing.
        locks=settings.rollout_engine != "sglang",
        delta=settings.update_weight_mode == "delta",
        digests=settings.check_weight_update_equal,
        host=address or LOOPBACK,
        backend="nccl" if models.plan.device.startswith("cuda") else "gloo",
    )
    return make_sender(wanted, Path(str(models.config.model.hf_checkpoint)), written)
