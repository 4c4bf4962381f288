"""Make the arithmetic task: problems, a held-out set, a character tokenizer and a small
untrained model.

    python examples/arithmetic/make_task.py outputs/arithmetic

A problem is "12+34=" and its answer "046". The worked examples for the warm-up come from a
careless teacher, who mostly forgets to carry: what they teach is a mediocre policy that
reinforcement learning can improve. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

CHARACTERS = "0123456789+-*="
SPECIALS = ("<pad>", "<eos>")
NUM_TOKENS = len(SPECIALS) + len(CHARACTERS)
CONTEXT = 64
NUM_HELDOUT = 512
CARE = 0.35
"""How often the teacher carries."""


def make_problems(seed: int) -> dict[str, list[dict[str, str]]]:
    """All sums of two numbers below 100, shuffled: held-out first, the rest to train on.

    `sft` has the problems to train on with the teacher's answers, the others have the right ones.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(pairs)
    rows = [_row(a, b, a + b) for a, b in pairs]
    taught = [_row(a, b, a + b if rng.random() < CARE else _careless(a, b)) for a, b in pairs]
    return {
        "heldout": rows[:NUM_HELDOUT],
        "train": rows[NUM_HELDOUT:],
        "sft": taught[NUM_HELDOUT:],
    }


def _row(a: int, b: int, answer: int) -> dict[str, str]:
    return {"input": f"{a:02d}+{b:02d}=", "label": f"{answer:03d}"}


def _careless(a: int, b: int) -> int:
    """The sum digit by digit, every carry forgotten."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def make_tokenizer(
    path: Path,
    characters: str = CHARACTERS,
    specials: tuple[str, ...] = SPECIALS,
    context: int = CONTEXT,
) -> None:
    """A tokenizer of one token per character, saved as a Hugging Face directory.

    `specials` begins with the padding and the end; others are tokens of the text, e.g. tags.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*specials, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(list(specials[2:]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        eos_token=specials[1],
        model_max_length=context,
    ).save_pretrained(path)


def make_model(path: Path, seed: int, num_tokens: int = NUM_TOKENS, context: int = CONTEXT) -> None:
    """A Qwen3-shaped model of 0.6 M parameters with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=num_tokens,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
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
