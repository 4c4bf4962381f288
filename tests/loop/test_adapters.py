"""A run that trained adapters, evaluated and served: with the weights of its merged export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dovetail.checkpoint.hf import load_model
from dovetail.cli.main import main
from dovetail.config.resolve import resolve
from dovetail.run.served import ServedParts
from tests.loop.good_run import Place, make_shared


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("adapters")
    (directory / "shared").mkdir()
    place = Place(make_shared(directory / "shared"), directory)
    changes: dict[str, object] = {"lora_rank": 4, "lr": 0.1, "save_hf": place.own / "export"}
    changes |= {"num_rollout": 2, "n_samples_per_prompt": 4, "max_lag": 1, "save_interval": 2}
    assert main(place.train(**changes)) == 0
    return place


def evaluated(place: Place, name: str, what: Path) -> tuple[object, list[str]]:
    """Numbers and responses."""
    held = ["held", place.shared / "rows.jsonl"]
    changes: dict[str, object] = dict.fromkeys(("hf_checkpoint", "prompt_data", "num_rollout"))
    changes |= {"run_dir": place.own / name, "eval_prompt_data": held}
    assert main(["eval", str(what), *place.flags(**changes)]) == 0
    (samples,) = (place.own / name / "eval").glob("held_*.jsonl")
    facts = json.loads((place.own / name / "evaluation.json").read_text())
    return facts["sets"], [json.loads(line)["response"] for line in samples.open()]


def test_what_is_evaluated_is_the_export(place: Place) -> None:
    of_run = evaluated(place, "of-run", place.run_dir)
    assert of_run == evaluated(place, "of-export", place.own / "export")
    assert of_run[1] != evaluated(place, "untrained", place.shared / "model")[1]


def test_what_is_served_is_the_export(place: Place) -> None:
    flags = ["--hf-checkpoint", str(place.shared / "model"), "--dtype", "float32"]
    flags += ["--load", str(place.run_dir / "checkpoints"), "--lora-rank", "4"]
    flags += ["--device", "cpu", "--num-threads", "1", "--engine-kv-tokens", "2048"]
    parts = ServedParts(resolve([], flags))
    try:
        assert parts.step == 2
        own = dict(parts.models.model.named_parameters())
    finally:
        parts.server.close()
        parts.compute.shutdown()
    export = load_model(place.own / "export", "float32")
    assert own.keys() == dict(export.named_parameters()).keys()
    for name, expected in export.named_parameters():
        torch.testing.assert_close(own[name], expected, rtol=0, atol=0, msg=name)
