"""Steps that JSON can't ask for: experts that are replayed, and losses on logits."""

from types import SimpleNamespace

import torch

from dovetail.algorithms.packed_logits import get_log_probs_and_entropy
from dovetail.trainers.hooks import TrainHooks
from tests.contract.trained import STEPS, Case, maker, rows_of
from tests.unit.trainers.test_routing_replay import some_routing

REPLAY = {
    "R2": {"samples_per_optimizer_step": 5, "algorithm": {"use_routing_replay": True}},
    "R3": {"samples_per_optimizer_step": 5, "algorithm": {"use_rollout_routing_replay": True}},
}


def specially(rank, world, make, case, what):
    """As `trained.trained`, with what JSON can't say."""
    hooks = {"hooks": TrainHooks(logits_loss=by_logits)} if what == "on logits" else {}
    case = {**case, "settings": {**case["settings"], **hooks}}
    trainer = maker(make)(rank, world, Case(**case))
    rows = [rows_of(step) for step in range(STEPS)]
    if what == "R3":
        rows = [some_routing(its) for its in rows]
    metrics = [trainer.train(its, step) for step, its in enumerate(rows)]
    # The torch backend counts tokens of a shared prompt once: of no use to compare by.
    replaced = [its.pop("train/routing_replaced", None) for its in metrics]
    weights = {name: tensor.flatten().tolist() for name, tensor in trainer.backend.hf_tensors()}
    return {"metrics": metrics, "weights": weights, "replaced": replaced}


def by_logits(batch, logits, reduce):
    """A policy gradient in the form of the slime family."""
    keys = ("unconcat_tokens", "total_lengths", "response_lengths")
    _, found = get_log_probs_and_entropy(
        logits, args=SimpleNamespace(rollout_temperature=1.0), **{key: batch[key] for key in keys}
    )
    pairs = zip(found["log_probs"], batch["advantages"], strict=True)
    terms = [-own * advantage.to(own) for own, advantage in pairs]
    loss = reduce(torch.cat(terms))
    return loss, {"own": loss.detach()}
