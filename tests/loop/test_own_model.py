"""A user's own model on a user's own data, by flags alone: what is exported is what was trained."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail.checkpoint import hf
from dovetail.checkpoint.manager import load_checkpoint
from dovetail.cli.main import main
from dovetail.engines.embedded.engine import EmbeddedEngine
from dovetail.trainers.torch.restore import restore_weights
from dovetail.types import GenerateRequest, SamplingParams
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import make_model, make_rows, read_metrics

PROMPTS = ("3+4=", "9+0=", "What is 1+1? ", "a")
LENGTH = 24


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of 4 GRPO steps on 200 rows, with `exported/` and checkpoints."""
    place = Place(make_shared(tmp_path_factory.mktemp("shared")), tmp_path_factory.mktemp("own"))
    make_model(place.own / "model", request.param)
    rows = make_rows(place.own / "rows.jsonl", count=200)
    argv = place.train(
        hf_checkpoint=place.own / "model",
        prompt_data=rows,
        num_rollout=4,
        rollout_batch_size=4,
        n_samples_per_prompt=4,
        rollout_max_response_len=8,
        lr=1e-2,
        save_interval=2,
        save_hf=place.own / "exported",
        eval_prompt_data=["first", f"{rows}@[0:8]"],
        eval_temperature=0.0,
    )
    assert main(argv) == 0
    return place


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def _greedy_by_transformers(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH
        )
        answers.append(made[0, ids.shape[1] :].tolist())
    return answers


def _greedy_by_engine(model: torch.nn.Module, directory: Path) -> list[list[int]]:
    tokenizer = hf.load_tokenizer(directory)
    engine = EmbeddedEngine(
        model,
        tokenizer,
        max_running=4,
        kv_tokens=512,
        max_context_len=128,
        fused="auto",
        cuda_graphs=False,
        eos_token_ids=hf.eos_token_ids(model, tokenizer),
    )
    sampling = SamplingParams(temperature=0.0, max_new_tokens=LENGTH)

    async def work() -> list[list[int]]:
        requests = [
            GenerateRequest(prompt, tuple(tokenizer.encode(prompt)), sampling) for prompt in PROMPTS
        ]
        results = await asyncio.gather(*(engine.generate(request) for request in requests))
        await engine.close()
        return [result.token_ids for result in results]

    return asyncio.run(work())


def test_the_run_learned_something_and_left_what_it_promises(trained: Place) -> None:
    rows = read_metrics(trained.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    before, after = _weights(trained.own / "model"), _weights(trained.own / "exported")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    names = {path.name for path in trained.run_dir.iterdir()}
    assert {"config.toml", "origins.json", "samples", "checkpoints", "result.json"} <= names


def test_the_export_answers_in_transformers_as_our_engine_does(trained: Place) -> None:
    expected = _greedy_by_transformers(trained.own / "exported")
    exported = hf.load_model(trained.own / "exported", "float32")
    assert _greedy_by_engine(exported, trained.own / "exported") == expected
    # And so do the weights of the last checkpoint, which never went through the export.
    model = hf.load_model(trained.own / "model", "float32")
    checkpoint = load_checkpoint(trained.run_dir / "checkpoints")
    assert checkpoint.step == 4
    restore_weights(model, checkpoint.part("policy")[0])
    assert _greedy_by_engine(model, trained.own / "model") == expected


def test_convert_writes_the_same_weights(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "converted"
    assert main(["convert", str(trained.run_dir / "checkpoints"), str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    one, other = _weights(target), _weights(trained.own / "exported")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert AutoTokenizer.from_pretrained(target).decode([3, 4]) == "01"
    assert main(["convert", str(trained.run_dir / "checkpoints" / "step_000002"), str(target)]) == 2
    assert "is there already and not empty" in capsys.readouterr().err


def test_a_checkpoint_and_its_export_evaluate_alike(
    trained: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name, changes in {
        "exported": {"hf_checkpoint": trained.own / "exported"},
        "checkpoint": {
            "hf_checkpoint": trained.own / "model",
            "load": trained.run_dir / "checkpoints",
        },
    }.items():
        flags = trained.flags(
            **changes,
            run_dir=tmp_path / name,
            eval_prompt_data=["first", f"{trained.own / 'rows.jsonl'}@[0:8]"],
            eval_temperature=0.0,
            progress="plain",
        )
        assert main(["eval", *flags]) == 0
        assert "eval" in capsys.readouterr().out
        (row,) = read_metrics(tmp_path / name)
        found.append({k: v for k, v in row.items() if k.startswith("eval/")})
        assert (tmp_path / name / "eval").is_dir()
    assert found[0] == found[1] and found[0]["eval/first/response_length"] > 0
