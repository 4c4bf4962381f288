"""A search engine that ranks as BM25 does, and a run that learns to use it without learning what
it says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from tests.examples.example_run import ROOT, RunExample, samples_of

HERE = ROOT / "examples" / "search_r1"
sys.path.append(str(HERE))

from bm25 import Bm25  # noqa: E402
from make_data import make_data  # noqa: E402


def test_bm25_finds_rare_words_first_and_short_documents_before_long_ones() -> None:
    index = Bm25(["a cat", "a dog and a cat and a hen", "a hen", "a cow"])
    # "hen" is in two of four documents, in the shorter one it weighs more.
    assert index.search("Hen!", 5) == ["a hen", "a dog and a cat and a hen"]
    # "cow" is in one document and "cat" in two: ln(10/3) against ln(2).
    assert index.search("cat cow", 1) == ["a cow"]
    assert index.search("fox", 5) == []


def test_the_search_engine_has_the_answer_to_every_question(tmp_path: Path) -> None:
    index = Bm25.from_file(HERE / "corpus.jsonl")
    assert index.search("spider legs", 1) == ["a spider has 8 legs"]
    assert index.search("sun planets", 1) == ["the sun has 8 planets"]


def test_a_run_learns_to_search_and_not_what_it_was_told(
    run_example: RunExample, tmp_path: Path
) -> None:
    make_data(tmp_path)
    model, data = tmp_path / "model", tmp_path / "train.jsonl"
    flags = ["--hf-checkpoint", model, "--prompt-data", data, "--rollout-max-response-len", 48]
    rows = run_example("search_r1", *flags, "--num-rollout", 12, "--rollout-batch-size", 4)
    rewards = [row["rollout/reward"] for row in rows]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = [one for step in range(1, 13) for one in samples_of(tmp_path, step)]
    searched = [one for one in samples if one["metadata"]["searches"]]
    assert searched
    for sample in searched:
        ids = sample["tokens"][-sample["response_length"] :]
        told = [token for token, mask in zip(ids, sample["loss_mask"], strict=True) if not mask]
        assert tokenizer.decode(told).startswith("<information>")
        assert tokenizer.decode(told).endswith("</information>")
        for log_prob, mask in zip(sample["rollout_log_probs"], sample["loss_mask"], strict=True):
            assert (log_prob < 0) == bool(mask)
    assert all(
        sample["loss_mask"] == [1] * len(sample["loss_mask"])
        for sample in samples
        if not sample["metadata"]["searches"]
    )
