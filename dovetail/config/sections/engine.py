"""What makes the tokens."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from dovetail.config.sections.base import Section

_OWN_HOSTS = ("localhost", "::1")


class EngineConfig(Section):
    """What makes the tokens."""

    rollout_engine: str = Field(
        "embedded",
        description=(
            "Engine by name: embedded runs on the trainer's own tensors, vllm and sglang are "
            "servers that this run starts, or that run already (rollout_external_engine_addrs)."
        ),
    )
    rollout_num_engines: int = Field(
        1,
        ge=1,
        description=(
            "Engines of this run; of more than one embedded, each has a process and weights of "
            "its own."
        ),
    )
    rollout_external_engine_addrs: list[str] = Field(
        default_factory=list,
        description="Engines that run already, HOST:PORT each; none is started then.",
    )
    engine_token_env: str | None = Field(
        None,
        description=(
            "Environment variable with the token that the engines of rollout_external_engine_addrs "
            "want (Authorization: Bearer)."
        ),
    )
    engine_python: str | None = Field(
        None,
        description=(
            "Python that has vLLM or SGLang installed; default: $DOVETAIL_VLLM_PYTHON "
            "($DOVETAIL_SGLANG_PYTHON), else what `make vllm` made, else the run's own."
        ),
    )
    engine_start_timeout_s: float = Field(
        600.0,
        gt=0,
        description=(
            "Longest wait for a started engine to answer, in seconds; one that runs already must "
            "answer at once unless this is set."
        ),
    )
    weight_transport: Literal["auto", "shared_memory", "cuda_ipc", "broadcast", "disk"] = Field(
        "auto",
        description=(
            "How weights reach engines in other processes: through /dev/shm of this machine, as "
            "handles of GPU memory, by a process group of trainer and engines, or files in "
            "update_weight_disk_dir; auto: through /dev/shm where every engine is on the trainer's "
            "machine and it has room, else update_weight_disk_dir."
        ),
    )
    update_weight_mode: Literal["full", "delta"] = Field(
        "full",
        description="What weight_transport disk writes: every tensor, or only what changed.",
    )
    update_weight_buffer_size: int = Field(
        512 * 1024**2,
        ge=1024**2,
        description=(
            "Bytes of full tensors that are gathered from the ranks, and on their way to the "
            "engines, at a time."
        ),
    )
    check_weight_update_equal: bool = Field(
        False,
        description=(
            "After every update compare what the engines hold with what was sent; a difference "
            "ends the run."
        ),
    )
    update_weight_disk_dir: str | None = Field(
        None, description="Where weight_transport disk writes; engines must see the same path."
    )
    server_concurrency: int = Field(
        512, ge=1, description="Most requests at once in each engine of another process."
    )
    use_fault_tolerance: bool = Field(
        True,
        description=(
            "Start an engine anew when it died or does not react; false: the run ends then."
        ),
    )
    rollout_health_check_interval: float = Field(
        5.0, gt=0, description="Seconds between two looks at whether an engine reacts."
    )
    rollout_health_check_timeout: float = Field(
        10.0, gt=0, description="Seconds without an answer until such a look has failed."
    )
    rollout_health_check_first_wait: float = Field(
        0.0, ge=0, description="Seconds after a start before the first look."
    )
    engine_max_running: int = Field(
        0,
        ge=0,
        description="Most sequences decoded at once; 0: as many as a step needs, up to 256.",
    )
    engine_kv_tokens: int = Field(
        0, ge=0, description="Tokens that the KV cache holds; 0: from engine_memory_gb."
    )
    engine_memory_gb: float = Field(
        2.0, gt=0, description="Memory for the KV cache when engine_kv_tokens is 0."
    )
    engine_fused: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "Fused decoding for Llama/Qwen models after a check against the module's "
            "logits; on fails where auto falls back."
        ),
    )
    engine_cuda_graphs: bool = Field(
        True, description="Capture decode steps as CUDA graphs where a GPU is present."
    )

    @property
    def in_processes(self) -> bool:
        """Whether engines have processes, and weights, of their own."""
        several = self.rollout_num_engines > 1 or bool(self.rollout_external_engine_addrs)
        return self.rollout_engine != "embedded" or several

    @property
    def external_urls(self) -> list[str]:
        """`rollout_external_engine_addrs` as addresses with a scheme."""
        return [
            (addr if "://" in addr else f"http://{addr}").rstrip("/")
            for addr in self.rollout_external_engine_addrs
        ]

    @property
    def all_local(self) -> bool:
        """Whether every engine is on this machine, and so sees its memory."""
        hosts = [urlsplit(url).hostname or "" for url in self.external_urls]
        return all(host in _OWN_HOSTS or host.startswith("127.") for host in hosts)
