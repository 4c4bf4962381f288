"""Examples run unchanged with two trainer ranks and two engines on Ray, and learn as in one
process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from tests.examples.example_run import QUIET, ROOT
from tests.loop.tiny import read_metrics
from tests.on_ray import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("ray")]

STEPS = 4
SIZES = ["--num-rollout", STEPS, "--rollout-batch-size", 8, "--n-samples-per-prompt", 4]
EXAMPLES = {
    # An untrained model gets no sum right: it learns to stop, for which DAPO's reward has a part.
    "arithmetic/grpo.toml": [
        *("--eval-interval", STEPS, "--lr", 1e-3, "--lr-warmup-iters", 0),
        *("--custom-rm-path", "examples/dapo/reward.py:reward", "--reward-key", "score"),
    ],
    "dapo/run.toml": ["--over-sampling-batch-size", 12],
    "dr_grpo/run.toml": [],
}
FILTERED = "dapo/run.toml"
RISES = (FILTERED, "arithmetic/grpo.toml")
"""They learn within these few steps: to stay within the limit."""

Trained = Callable[[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes() as address:
        yield address


@pytest.fixture(scope="module")
def trained(
    task: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """`trained(example, mode)`: the rows of metrics.jsonl; each is run once."""
    ranks = ["--ray-address", cluster, "--actor-num-gpus-per-node", 2, "--rollout-num-engines", 2]
    # Two nodes: the engines of a disaggregated run have the second one.

    @cache
    def train(example: str, mode: str) -> list[dict[str, Any]]:
        run_dir = tmp_path_factory.mktemp("example") / "run"
        own = ["--hf-checkpoint", task / "model", "--run-dir", run_dir]
        own += ["--prompt-data", task / "train.jsonl", *SIZES, *EXAMPLES[example]]
        if example.startswith("arithmetic"):
            own += ["--eval-prompt-data", "heldout", task / "heldout.jsonl"]
        own += ["--mode", mode, *(ranks if mode != "local" else [])]
        given = ["train", f"examples/{example}", *QUIET.split(), *map(str, own)]
        assert main(given) == 0
        return read_metrics(run_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield train


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_learns_as_in_one_process(example: str, mode: str, trained: Trained) -> None:
    alone, spread = (
        [row["rollout/reward"] for row in trained(example, where) if "rollout/reward" in row]
        for where in ("local", mode)
    )
    assert len(spread) == STEPS
    # A filter that replaces groups sees them in the order in which engines finish them.
    assert spread == pytest.approx(alone, abs=0.2 if example == FILTERED else 0.02)
    if example in RISES:
        assert spread[-1] > spread[0] + 0.3
