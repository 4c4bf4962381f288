"""Make the arithmetic task: problems, a held-out set, a character tokenizer and a small
untrained model.

    python examples/arithmetic/make_task.py outputs/arithmetic

A problem is "12+34=" and its answer "046". The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

CHARACTERS = "0123456789+-*="
SPECIALS = ("<pad>", "<eos>")
NUM_HELDOUT = 512
NUM_SFT = 4096


def make_problems(seed: int) -> dict[str, list[dict[str, str]]]:
    """All sums of two numbers below 100, shuffled: held-out first, the rest to train on."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    rows = [{"input": f"{a:02d}+{b:02d}=", "label": f"{a + b:03d}"} for a, b in pairs]
    heldout, train = rows[:NUM_HELDOUT], rows[NUM_HELDOUT:]
    return {"heldout": heldout, "train": train, "sft": train[:NUM_SFT]}


def make_tokenizer(path: Path) -> None:
    """A tokenizer of one token per character, saved as a Hugging Face directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=64
    ).save_pretrained(path)


def make_model(path: Path, seed: int) -> None:
    """A Qwen3-shaped model of 0.6 M parameters with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(SPECIALS) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)


def make_task(directory: Path, seed: int) -> None:
    """Write `model/` and one JSONL file per split into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in make_problems(seed).items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    make_model(directory / "model", seed)
    make_tokenizer(directory / "model")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_task(options.directory, options.seed)
    print(f"wrote {options.directory}")


if __name__ == "__main__":
    main()
