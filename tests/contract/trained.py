"""What every training backend is asked to do: some steps on the same rows, from equal weights."""

import torch
import torch.distributed as dist

from dovetail.trainers.data_parallel import ALONE, DataParallel
from tests.unit.trainers.tiny import make_model, make_rows, make_trainer

STEPS = 3
CASES = {
    "grpo": {},
    "minibatches and KL": {
        "samples_per_optimizer_step": 5,
        "algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.1},
    },
    "old logprobs and whitening": {
        "samples_per_optimizer_step": 6,
        "algorithm": {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.05},
    },
    "sequences": {"algorithm": {"advantage_estimator": "gspo"}},
    "a correction": {"algorithm": {"use_tis": True}},
    "padded": {"batch": {"micro_batch_size": 2}},
}


def replicated(rank, world):
    """Each rank has the whole model."""
    return ALONE if world == 1 else DataParallel(rank, world, dist.group.WORLD)


def trained(rank, world, case, architecture="Qwen3", kind="replicated", seed=0):
    """Metrics of each step and, of rank 0, the weights after the last one."""
    model = make_model(architecture, seed=seed)
    settings = {"optimizer": {"lr": 1e-2, "clip_grad": 0.5}, **CASES[case]}
    parallel = {"replicated": replicated}[kind](rank, world)
    trainer = make_trainer(model, make_model(architecture, seed=1), parallel=parallel, **settings)
    metrics = [trainer.train(rows_of(step), step) for step in range(STEPS)]
    weights = {name: p.flatten().tolist() for name, p in model.named_parameters()}
    return {"metrics": metrics, "weights": weights if rank == 0 else None}


def rows_of(step):
    """With engine logprobs, as a rollout leaves them."""
    rows = make_rows(seed=step, prompts=4, group=3)
    draw = torch.Generator().manual_seed(step)
    for row in rows:
        noise = torch.rand(row.response_length, generator=draw)
        object.__setattr__(row, "rollout_logprobs", (-1 - 3 * noise).tolist())
    return rows
