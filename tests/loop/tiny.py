"""A task small enough that a whole run takes seconds: a tiny model, a character tokenizer, sums
to learn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*=abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ\\{}.,:?!"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def make_tokenizer(path: Path) -> None:
    """One token per character, `<pad>` 0, `<eos>` 1."""
    vocab = {token: i for i, token in enumerate(("<pad>", "<eos>", "<unk>", *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)


def make_model(path: Path, model_type: str = "qwen3", seed: int = 0, **overrides: Any) -> Path:
    """A Hugging Face directory with random weights and the tokenizer of `make_tokenizer`."""
    import torch

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        **{
            **SHAPE,
            "vocab_size": len(CHARACTERS) + 3,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            **overrides,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer(path)
    return path


def make_rows(path: Path, count: int = 64) -> Path:
    """JSONL rows {"input": "3+4=", "label": "7"}."""
    rows = [
        {"input": f"{i % 10}+{i // 10 % 10}=", "label": str(i % 10 + i // 10 % 10)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows less what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(("time", "perf/"))} for row in rows]
