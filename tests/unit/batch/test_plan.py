"""Which rows train together, and where their tokens lie."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.batch.pack import pack
from dovetail.batch.plan import Scope, optimizer_steps, plan_packed, plan_padded, used_length
from dovetail.batch.rows import TrainRow


def make_rows(seed, prompts=3, group=4, longest=9):
    draw = random.Random(seed)
    rows = []
    for g in range(prompts):
        prompt = [draw.randrange(1, 50) for _ in range(draw.randint(1, longest))]
        for _ in range(group):
            length = draw.randint(0, longest)
            rows.append(
                TrainRow(
                    tokens=prompt + [draw.randrange(1, 50) for _ in range(length)],
                    response_length=length,
                    loss_mask=[int(draw.random() < 0.8) for _ in range(length)],
                    group_index=g,
                    index=len(rows),
                )
            )
    draw.shuffle(rows)
    return rows


def expected_pairs(rows, scope):
    """(row, predicting token prefix, target) of every scored token."""
    return sorted(
        (i, tuple(row.tokens[: row.prompt_length + t]), row.tokens[row.prompt_length + t])
        for i, row in enumerate(rows)
        for t in range(row.response_length)
        if scope is Scope.RESPONSE or row.loss_mask[t]
    )


def prefix_at(batch, flat):
    """The tokens that the position sees, by the layout's own rules."""
    if not batch.segments:
        line, at = divmod(flat, batch.input_ids_BT.shape[1])
        return tuple(batch.input_ids_BT[line, : at + 1].tolist())
    ids = batch.input_ids_BT[0].tolist()
    own = next(s for s in batch.segments if s.start <= flat < s.start + s.length)
    prefix = ids[own.prefix_start : own.prefix_start + own.prefix_length]
    seen = prefix + ids[own.start : flat + 1]
    assert batch.position_ids_BT[0, flat] == len(seen) - 1
    return tuple(seen)


def planned(rows, kind, budget, max_rows, scope):
    chosen = range(len(rows))
    if kind == "padded":
        return plan_padded(rows, chosen, budget, max_rows, scope=scope)
    share = kind == "shared"
    return plan_packed(rows, chosen, budget, max_rows, share=share, scope=scope)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["padded", "packed", "shared"]),
    budget=st.integers(1, 120),
    max_rows=st.sampled_from([None, 1, 3]),
    scope=st.sampled_from([Scope.TRAINED, Scope.RESPONSE]),
)
def test_every_scored_token_is_predicted_once_from_its_own_prefix(
    seed, kind, budget, max_rows, scope
):
    rows = make_rows(seed)
    pairs = []
    for plan in planned(rows, kind, budget, max_rows, scope):
        batch = pack(rows, plan, 0, scope)
        counts = [len(scored) for scored in batch.scored]
        owners = [i for i, count in zip(batch.rows, counts, strict=True) for _ in range(count)]
        for owner, at, target in zip(
            owners, batch.hidden_index_N.tolist(), batch.targets_N.tolist(), strict=True
        ):
            pairs.append((owner, prefix_at(batch, at), target))
        assert batch.input_ids_BT.numel() == plan.num_tokens
        assert plan.num_tokens <= budget or len(plan.rows) == 1
        assert max_rows is None or len(plan.rows) <= max_rows
    assert sorted(pairs) == expected_pairs(rows, scope)


def test_siblings_share_their_prompt():
    rows = [
        TrainRow(tokens=[1] * 10 + [i] * 4, response_length=4, loss_mask=[1] * 4, index=i)
        for i in range(4)
    ]
    (shared,) = plan_packed(rows, range(4), 100, None, share=True)
    (alone,) = plan_packed(rows, range(4), 100, None, share=False)
    # The last response token predicts nothing.
    assert shared.num_tokens == 10 + 4 * 3
    assert alone.num_tokens == 4 * 13


def test_a_tree_over_the_budget_is_split_and_repeats_its_prompt():
    rows = [
        TrainRow(tokens=[1] * 10 + [i] * 4, response_length=4, loss_mask=[1] * 4, index=i)
        for i in range(4)
    ]
    plans = plan_packed(rows, range(4), 16, None, share=True)
    assert [plan.num_tokens for plan in plans] == [16, 16]


def test_rows_without_trained_tokens_are_not_seen_by_the_model():
    row = TrainRow(tokens=[1, 2, 3], response_length=2, loss_mask=[0, 0])
    assert plan_packed([row], [0], 100, None, share=True) == []
    assert plan_padded([row], [0], 100, None) == []


def test_tokens_after_the_last_trained_one_are_not_seen():
    row = TrainRow(tokens=list(range(10)), response_length=6, loss_mask=[1, 0, 1, 0, 0, 0])
    assert used_length(row, Scope.TRAINED) == 6
    assert used_length(row, Scope.RESPONSE) == 9
    assert used_length(row, Scope.SEQUENCE) == 10


def test_a_step_takes_whole_rollouts_and_the_last_one_what_is_left():
    ids = [None, 4, 4, None, 4, None]
    rows = [TrainRow(tokens=[1, 2], response_length=1, loss_mask=[1], rollout_id=i) for i in ids]
    assert optimizer_steps(rows, 2) == [[0, 1, 2, 4], [3, 5]]
    assert optimizer_steps(rows, 3) == [[0, 1, 2, 3, 4], [5]]


def test_values_follow_their_tokens():
    rows = [
        TrainRow(tokens=[1, 2, 3, 4], response_length=3, loss_mask=[1, 0, 1]),
        TrainRow(tokens=[5, 6], response_length=1, loss_mask=[1]),
    ]
    (plan,) = plan_packed(rows, [0, 1], 100, None, share=True)
    batch = pack(rows, plan, 0)
    assert batch.rows == (0, 1)
    assert batch.flat([[0.1, 0.2, 0.3], torch.tensor([0.4])]).tolist() == pytest.approx(
        [0.1, 0.3, 0.4]
    )
    assert batch.per_row([7.0, 8.0]).tolist() == [7.0, 7.0, 8.0]


def test_very_short_prompts_are_not_shared():
    rows = [
        TrainRow(tokens=[1, 2, 3] + [i] * 4, response_length=4, loss_mask=[1] * 4, index=i)
        for i in range(4)
    ]
    (plan,) = plan_packed(rows, range(4), 100, None, share=True)
    assert [tree.rows for tree in plan.trees] == [(0,), (1,), (2,), (3,)]
