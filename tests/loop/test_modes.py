"""One run, three modes: in one process, and with two trainer ranks and two engines on Ray. With the
ranks beside the engines, weights go through shared memory, or by broadcast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.checkpoint.hf_weights import read_weights
from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import read_metrics
from tests.on_ray import nothing_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("modes")]

STEPS, GROUPS, SIBLINGS = 3, 2, 4
RANKS = {"actor_num_gpus_per_node": 2, "rollout_num_engines": 2}
TASK = {
    "num_rollout": STEPS,
    "rollout_batch_size": GROUPS,
    "n_samples_per_prompt": SIBLINGS,
    "lr": 1e-2,
    "save_interval": 1,
    "save_hf": "export",
}


class Done:
    """What a run left."""

    def __init__(self, place: Place) -> None:
        self.run_dir = place.run_dir
        self.metrics = read_metrics(place.run_dir)
        self.export = place.own / "export"

    def samples(self, step: int) -> list[dict[str, Any]]:
        lines = (self.run_dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda sample: sample["index"])

    def series(self, name: str) -> list[float]:
        return [row[name] for row in self.metrics if name in row]


def run(shared: Path, own: Path, **changes: object) -> Done:
    own.mkdir()
    place = Place(shared, own)
    given = {**TASK, "save_hf": own / "export", **changes}
    with nothing_left():
        assert main(place.train(**given)) == 0
    return Done(place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Done]]:
    directory = tmp_path_factory.mktemp("modes")
    (directory / "shared").mkdir()
    shared = make_shared(directory / "shared")
    found = {"local": run(shared, directory / "local")}
    for mode in ("disaggregated", "colocated"):
        found[mode] = run(shared, directory / mode, mode=mode, **RANKS)
    ways = {"mode": "disaggregated", "weight_transport": "broadcast", "save_interval": STEPS}
    found["broadcast"] = run(shared, directory / "broadcast", **RANKS, **ways)
    yield found
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_samples_are_those_of_one_process(runs: dict[str, Done], mode: str) -> None:
    for step in range(1, STEPS + 1):
        ours, theirs = (runs[name].samples(step) for name in ("local", mode))
        assert [one["response"] for one in ours] == [one["response"] for one in theirs]
        assert [one["index"] for one in theirs] == list(
            range((step - 1) * GROUPS * SIBLINGS, step * GROUPS * SIBLINGS)
        )


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_losses_and_gradient_norms_are_those_of_one_process(
    runs: dict[str, Done], mode: str
) -> None:
    for name in ("train/loss", "train/grad_norm", "rollout/reward", "train/tokens"):
        assert runs[mode].series(name) == pytest.approx(
            runs["local"].series(name), rel=1e-3, abs=1e-5
        )


def test_weights_by_broadcast_are_those_of_shared_memory(runs: dict[str, Done]) -> None:
    shared, sent = runs["disaggregated"], runs["broadcast"]
    for step in range(1, STEPS + 1):
        ours, theirs = (one.samples(step) for one in (shared, sent))
        for name in ("index", "tokens", "weight_versions"):
            assert [one[name] for one in ours] == [one[name] for one in theirs], name
        # What comes at once is decoded at once, and rounded as it happens.
        for one, other in zip(ours, theirs, strict=True):
            assert one["rollout_log_probs"] == pytest.approx(other["rollout_log_probs"], abs=1e-5)
    for name in ("train/loss", "train/grad_norm", "rollout/reward"):
        assert sent.series(name) == pytest.approx(shared.series(name), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_what_is_exported_is_what_one_process_exports(runs: dict[str, Done], mode: str) -> None:
    from transformers import AutoModelForCausalLM

    one, other = (
        AutoModelForCausalLM.from_pretrained(runs[name].export) for name in ("local", mode)
    )
    found = read_weights(runs[mode].export, other, "")
    assert found
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_every_process_writes_a_log_named_by_its_role(runs: dict[str, Done], mode: str) -> None:
    logs = {path.name for path in (runs[mode].run_dir / "logs").iterdir()}
    assert {"trainer_rank_0.log", "trainer_rank_1.log"} <= logs
    assert (runs[mode].run_dir / "engines" / "engine_1.log").is_file()


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_checkpoints_of_ranks_are_converted_and_go_on_in_one_process(
    runs: dict[str, Done], mode: str, tmp_path: Path
) -> None:
    done = runs[mode]
    target = tmp_path / "converted"
    assert main(["convert", str(done.run_dir / "checkpoints"), str(target)]) == 0
    from transformers import AutoModelForCausalLM

    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (done.export, target))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)
