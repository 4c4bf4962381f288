"""Whole runs on built-in rewards: a weighted sum with everything in it, and a judge that fails."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.same import losses
from tests.loop.tiny import read_metrics
from tests.unit.rewards.rude_judge import FAULTS, RudeJudge


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def test_a_sum_of_all_kinds_trains_is_measured_and_evaluated(place: Place) -> None:
    # Every response is cut off at 10 tokens, so overlong is -1, linear_length -1 and, as all have
    # one length, length_penalty 0; nothing is right or has a form.
    heldout = place.write("heldout.jsonl", '{"input": "1+1=", "label": "2"}\n')
    argv = place.train(
        custom_rm_path=None,
        rm_type="math, 0.5*format, 0.25*overlong, 0.125*linear_length, length_penalty, 0*random",
        group_rm=True,
        num_rollout=2,
        rollout_min_new_tokens=10,
        rollout_max_response_len=10,
        eval_interval=1,
        eval_sets=json.dumps(
            {
                "acc": {"path": heldout, "rm_type": "dapo", "reward_key": "acc"},
                "sum": {"path": heldout, "rm_type": "0.5*dapo, format", "reward_key": "score"},
            }
        ),
    )
    assert main(argv) == 0
    rows = read_metrics(place.run_dir)
    (parts,) = [row for row in rows if "rollout/reward_parts/math" in row and row["step"] == 1]
    assert parts["rollout/reward_parts/overlong"] == -1.0
    assert parts["rollout/reward_parts/linear_length"] == -1.0
    assert parts["rollout/reward_parts/length_penalty"] == 0.0
    # 0.25 x -1 + 0.125 x -1
    assert parts["rollout/reward"] == -0.375 + parts["rollout/reward_parts/math"]
    (evaluated,) = [row for row in rows if "eval/sum/reward" in row and row["step"] == 1]
    assert evaluated["eval/acc/reward"] == 0.0
    assert evaluated["eval/sum/reward"] == -0.5
    assert evaluated["eval/sum/reward_parts/dapo"] == -1.0


def test_a_run_whose_judge_fails_30_percent_of_the_calls_ends_as_if_it_did_not(
    place: Place, tmp_path: Path
) -> None:
    draw = random.Random(0)

    def misbehave(call: int) -> str | None:
        return draw.choice(FAULTS) if draw.random() < 0.3 else None

    def train(url: str, name: str) -> list[float]:
        run_dir = tmp_path / name
        argv = place.train(
            custom_rm_path=None,
            rm_type="remote_rm",
            rm_url=url,
            num_rollout=4,
            rollout_batch_size=8,
            n_samples_per_prompt=4,
            run_dir=run_dir,
        )
        assert main(argv) == 0
        return losses(run_dir)

    with RudeJudge(lambda call: None) as polite:
        expected = train(polite.url, "polite")
    assert len(expected) == 4
    with RudeJudge(misbehave) as rude:
        assert train(rude.url, "rude") == expected
    assert all(rude.seen[fault] >= 3 for fault in FAULTS)  # The witness.
    # More where a busy machine makes a good answer late, and it is asked for again.
    assert rude.seen["good"] >= 4 * 8 * 4 <= polite.seen["good"]


def test_a_wrong_reward_key_ends_the_run_with_the_entries_that_are_there(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = place.train(
        custom_rm_path=None, rm_type="dapo", reward_key="scores", max_reward_failures=2
    )
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "'scores'" in said and "'score', 'acc', 'pred'" in said


def test_a_run_in_which_every_reward_fails_says_that_nothing_was_learned(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"instruction_id_list": ["detectable_format:no_such"], "kwargs": [{}]}
    row = {"input": "1+1=", "label": "2", "metadata": asked}
    data = place.write("rows.jsonl", (json.dumps(row) + "\n") * 2)
    argv = place.train(custom_rm_path=None, rm_type="ifbench", prompt_data=data)
    assert main(argv) == 0
    assert "nothing was learned: no sample had a reward" in capsys.readouterr().err
