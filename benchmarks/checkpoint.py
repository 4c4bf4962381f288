"""Makes the checkpoints that both sides load: a 27 M-parameter Qwen3 shape with seeded random
weights.

Random weights give uniform text that never ends. Two changes make lengths what a shape asks for,
by the weights alone, so that no side is told where to stop. Dimension 0 of the residual stream is
written by the embedding only: -1 for ordinary words, +1 for long words. The head's rows carry the
same sign, so a response stays in the mode in which its prompt ended. The row of the end token is
scaled along that dimension until, in ordinary mode, it has probability 1 / SHORT_RESPONSE_MEAN
(`long_tail`), or none at all (`uniform`); in long mode it never comes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.shapes import (
    EOS_ID,
    FIRST_LONG_WORD_ID,
    FIRST_WORD_ID,
    PAD_ID,
    SHORT_RESPONSE_MEAN,
    VOCAB_SIZE,
    word,
)

MODE_SIZE = 4.0
"""Size of dimension 0 in the embedding; the other dimensions grow to about 0.7 over the layers."""
MODE_LOGIT = 8.0
"""Advantage in logits of a mode's own words: changing the mode has a probability below 1e-5 a
token."""


def make_tokenizer() -> Any:
    """One word, one token; made on the fly, nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD_ID, "<eos>": EOS_ID}
    vocab |= {word(token_id): token_id for token_id in range(FIRST_WORD_ID, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(seed: int) -> Any:
    """Qwen3: 6 layers of width 512, 8 heads on 4 KV heads of 64, an untied head of 8192 words."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float().eval()


def set_lengths(model: Any, end_probability: float) -> None:
    """Give the end token this probability in ordinary mode (0.0: it never comes), and none in long
    mode."""
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 0] = -MODE_SIZE
        embedding[FIRST_LONG_WORD_ID:, 0] = MODE_SIZE
        probe_ids = torch.randint(FIRST_WORD_ID, FIRST_LONG_WORD_ID, (4, 128))
        hidden = model.model(probe_ids).last_hidden_state
        mode_size = hidden[..., 0].abs().mean()
        head[:, 0] = -MODE_LOGIT / mode_size
        head[FIRST_LONG_WORD_ID:, 0] = MODE_LOGIT / mode_size
        head[[PAD_ID, EOS_ID]] = 0
        if end_probability == 0.0:
            head[EOS_ID, 0] = 2 * MODE_LOGIT / mode_size
            return
        others = model.lm_head(hidden).float().index_fill(-1, torch.tensor([EOS_ID]), -math.inf)
        low, high = 0.0, 4 * MODE_LOGIT
        for _ in range(40):
            middle = (low + high) / 2
            logit = -hidden[..., 0] / mode_size * middle
            probability = torch.sigmoid(logit - others.logsumexp(-1)).mean()
            low, high = (middle, high) if probability < end_probability else (low, middle)
        head[EOS_ID, 0] = -(low + high) / 2 / mode_size


def make_checkpoints(directory: Path, seed: int) -> int:
    """Write `uniform` and `long_tail` under `directory`; gives the number of parameters."""
    tokenizer = make_tokenizer()
    parameters = 0
    for name, end_probability in (("uniform", 0.0), ("long_tail", 1 / SHORT_RESPONSE_MEAN)):
        model = make_model(seed)
        set_lengths(model, end_probability)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    print(make_checkpoints(arguments.directory, arguments.seed))
