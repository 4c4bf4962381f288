"""One real vLLM server for all tests that need one, and the model that it serves.

The interpreter is DOVETAIL_VLLM_PYTHON, else `.venvs/vllm/bin/python` of this checkout, which
`make vllm` makes. Without it these tests are skipped; where CI is set they fail.
"""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dovetail.checkpoint.hf_names import named_tensors, num_bytes
from dovetail.engines.launch import ClientSettings, LaunchSettings
from dovetail.engines.process import HeldPort, ServerProcess
from dovetail.engines.vllm.client import VllmEngine, make_client
from dovetail.engines.vllm.launch import launch
from dovetail.transport.place import Wanted
from dovetail.transport.snapshot import SnapshotStore
from dovetail.types.weights import Snapshot
from examples.arithmetic.make_task import NUM_TOKENS, make_tokenizer

ROOT = Path(__file__).parents[2]
CONTEXT = 512
EOS = 1
START_S = 400.0


def vllm_python() -> str:
    """The interpreter that has vLLM; skips the test where there is none, and fails it in CI."""
    python = Path(os.environ.get("DOVETAIL_VLLM_PYTHON", ROOT / ".venvs/vllm/bin/python"))
    if not python.exists():
        missing = f"{python} is not there: `make vllm`, or set DOVETAIL_VLLM_PYTHON"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return str(python)


def make_model_dir(path: Path) -> Path:
    """A tiny mixture of experts with one dense layer, whose head is the embedding; untrained, but
    with opinions."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    make_tokenizer(path, context=CONTEXT)
    return path


@dataclass
class Server:
    """A server that answers."""

    url: str
    model_dir: Path
    process: ServerProcess

    def client(self, **settings) -> VllmEngine:
        """A fresh client; use it within one event loop, and close it."""
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        known = {
            "max_context_len": CONTEXT,
            "vocab_size": NUM_TOKENS,
            "eos_token_ids": (EOS,),
            "tokenizer": tokenizer,
            "request_timeout_s": 100.0,
        }
        return make_client(self.url, ClientSettings(**{**known, **settings}))


def restore(server: Server) -> None:
    """Load the weights of the files again, as version 0, for the tests that follow."""
    model = AutoModelForCausalLM.from_pretrained(server.model_dir, dtype=torch.float32)
    store = SnapshotStore(Wanted(num_bytes=num_bytes(model)), server.model_dir)
    try:
        asyncio.run(_load(server, store.write(0, named_tensors(model))))
    finally:
        store.close()


async def _load(server: Server, snapshot: Snapshot) -> None:
    client = server.client()
    try:
        await client.load_snapshot(snapshot)
    finally:
        await client.close()


def start_server(directory: Path) -> Server:
    """Start one as a run does. The caller kills its process."""
    model_dir = make_model_dir(directory / "model")
    port = HeldPort()
    spec = launch(
        LaunchSettings(
            model_dir,
            port.number,
            CONTEXT,
            vllm_python(),
            dtype="float32",
            memory_gb=0.2,
            # As a user writes them: a number, a truth value, one of vLLM's own `no-`, JSON.
            passthrough={
                "max_num_seqs": "16",
                "enable_log_requests": False,
                "no_enable_chunked_prefill": True,
                "compilation_config": '{"mode": 0}',
            },
        )
    )
    process = ServerProcess(
        spec.argv, env=spec.env, log_file=directory / "vllm.log", name="engine 0 (vllm)"
    )
    server = Server(port.url, model_dir, process)
    process.start()
    try:
        asyncio.run(_ready(server))
    except BaseException:
        process.kill()
        raise
    return server


async def _ready(server: Server) -> None:
    client = server.client()
    try:
        await server.process.wait_ready(lambda: client.healthy(5.0), START_S)
    finally:
        await client.close()
