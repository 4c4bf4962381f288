"""Samples become columns and columns become rows; what a conversion adds is never lost."""

import numpy as np
import pytest
import torch

from dovetail.batch.columns import columns_of, edited_rows
from dovetail.batch.convert import rows_from_samples
from dovetail.types import HookRunError, Sample


def make_samples(count=3, **fields):
    return [
        Sample(
            index=10 + i,
            group_index=i // 2,
            tokens=[5, 6, 7, 8],
            response_length=2,
            reward=float(i),
            metadata={"i": i},
            **fields,
        )
        for i in range(count)
    ]


def documented(samples):
    """The dict of the family's guides: no rollout_ids."""
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "rewards": [2.0 * s.reward for s in samples],
        "raw_reward": [s.reward for s in samples],
        "truncated": [0 for _ in samples],
        "sample_indices": [s.index for s in samples],
        "loss_masks": [[1, 0] for _ in samples],
    }


def test_a_conversion_without_rollout_ids_is_fine_and_its_rewards_are_final():
    rows = rows_from_samples(make_samples(), convert=documented)
    assert [(r.reward, r.raw_reward, r.reward_is_final) for r in rows] == [
        (0.0, 0.0, True),
        (2.0, 1.0, True),
        (4.0, 2.0, True),
    ]
    assert [(r.index, r.group_index, r.rollout_id) for r in rows] == [
        (10, 0, None),
        (11, 0, None),
        (12, 1, None),
    ]
    assert rows[0].loss_mask == [1, 0]


def test_a_conversion_takes_the_place_of_the_reward_post_process():
    def post_process(samples):
        raise AssertionError("called")

    rows_from_samples(make_samples(), convert=documented, post_process=post_process)


def test_every_key_of_a_conversion_and_the_samples_metadata_reach_the_columns():
    samples = make_samples(train_metadata={"w": 1})

    def convert(samples):
        more = {"turns": [1, 2, 3], "embedding": torch.eye(3), "notes": np.array([7, 8, 9])}
        return {**documented(samples), **more}

    data = columns_of(rows_from_samples(samples, convert=convert))
    assert data["turns"] == [1, 2, 3] and data["notes"] == [7, 8, 9]
    assert torch.equal(torch.stack(data["embedding"]), torch.eye(3))
    assert [one is s.metadata for one, s in zip(data["metadata"], samples, strict=True)]
    assert data["train_metadata"] == [{"w": 1}] * 3


def test_metadata_that_a_conversion_makes_is_taken():
    def convert(samples):
        return {**documented(samples), "metadata": [{"own": s.index} for s in samples]}

    rows = rows_from_samples(make_samples(), convert=convert)
    assert [row.metadata for row in rows] == [{"own": 10}, {"own": 11}, {"own": 12}]


def test_a_conversion_may_give_fewer_sequences_which_are_known_by_their_index():
    def convert(samples):
        return documented([samples[2], samples[0]])

    rows = rows_from_samples(make_samples(), convert=convert)
    assert [row.metadata for row in rows] == [{"i": 2}, {"i": 0}]
    assert [row.group_index for row in rows] == [1, 0]


def test_tensors_are_taken_as_lists():
    def convert(samples):
        data = documented(samples)
        data["tokens"] = [torch.tensor(tokens) for tokens in data["tokens"]]
        data["loss_masks"] = torch.tensor(data["loss_masks"])
        data["rollout_ids"] = torch.tensor([4, 4, 5])
        data["rollout_mask_sums"] = [9, 9, 9]
        return data

    rows = rows_from_samples(make_samples(), convert=convert)
    assert [row.rollout_id for row in rows] == [4, 4, 5]
    assert rows[0].tokens == [5, 6, 7, 8] and rows[0].loss_mask == [1, 0]
    assert columns_of(rows)["rollout_mask_sums"] == [9, 9, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: None, "gave back NoneType, expected a dict"),
        (lambda d: {k: v for k, v in d.items() if k != "tokens"}, "has no tokens"),
        (lambda d: {k: v for k, v in d.items() if k != "rewards"}, "has no rewards"),
        (lambda d: {**d, "turns": [1]}, "turns has 1 entries, expected 3"),
        (lambda d: {**d, "turns": 5}, "turns is a int, expected a list with 3 entries"),
        (lambda d: {**d, "loss_masks": [[1]] * 3}, "sample 10: loss_mask has 1 entries"),
        (lambda d: {**d, "loss_masks": [[1, 0.5]] * 3}, "loss_masks has 0.5, expected 0 or 1"),
        (lambda d: {k: [] for k in d}, "has no sequence"),
        (lambda d: {**d, "response_lengths": [4] * 3}, "response_length 4 of 4 tokens"),
    ],
)
def test_what_a_conversion_gets_wrong_is_named(change, message):
    with pytest.raises(
        HookRunError, match=f"--custom-convert-samples-to-train-data-path.*{message}"
    ):
        rows_from_samples(make_samples(), convert=lambda samples: change(documented(samples)))


def test_optional_values_are_asked_of_every_sample():
    samples = make_samples()
    samples[1].rollout_log_probs = [-0.5, -0.25]
    samples[2].teacher_log_probs = [-0.125, -0.5]
    samples[2].metadata["round_number"] = 4
    data = columns_of(rows_from_samples(samples))
    assert data["rollout_log_probs"][0] is None and data["rollout_log_probs"][2] is None
    assert data["rollout_log_probs"][1].tolist() == [-0.5, -0.25]
    assert data["teacher_log_probs"][2].tolist() == [-0.125, -0.5]
    assert data["round_number"] == [None, None, 4]
    assert "multimodal_train_inputs" not in data


def test_samples_of_one_execution_share_their_divisor():
    samples = make_samples(loss_mask=[1, 1])
    samples[0].rollout_id = samples[1].rollout_id = 7
    data = columns_of(rows_from_samples(samples))
    assert data["rollout_ids"] == [0, 0, 1] and data["rollout_mask_sums"] == [4, 4, 2]


def test_the_raw_reward_of_the_metadata_is_shown():
    samples = make_samples()
    samples[0].metadata["raw_reward"] = {"acc": 1}
    assert columns_of(rows_from_samples(samples))["raw_reward"] == [{"acc": 1}, 1.0, 2.0]


def test_untouched_columns_give_the_same_rows():
    rows = rows_from_samples(make_samples(loss_mask=[1, 0], rollout_log_probs=[-0.5, 0.0]))
    assert edited_rows("rollout_data_postprocess", rows, columns_of(rows)) == rows
