"""What every training backend is asked to do: some steps on the same rows, from equal weights.

A row of the suite (`test_trainer_contract.ROWS`) names a maker, "module:function":

    make(rank, world, case: Case) -> Trainer

It builds the trainer of one rank for `case`, from the Hugging Face directory of the policy, and is
called anew for every case. Everything else is asked of the trainer through its public surface.
"""

import importlib
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from dovetail.checkpoint.hf_export import save_hf_tensors
from dovetail.checkpoint.hf_names import named_tensors
from dovetail.config.sections import BatchConfig, OptimizerConfig
from dovetail.trainers.critic import Critic
from dovetail.trainers.data_parallel import ALONE, DataParallel
from dovetail.trainers.torch.teacher import Teacher
from dovetail.types.errors import CheckpointError
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
WITH_MORE_MODELS = {
    "a critic": {"algorithm": {"advantage_estimator": "ppo", "lambd": 0.9}},
    "a teacher's logits": {"algorithm": {"loss_type": "distillation_loss"}},
}
"""Cases of backends that train or ask models beside policy and reference."""


@dataclass(frozen=True)
class Case:
    """What one row is held to."""

    policy: str
    """Directories in Hugging Face form."""
    reference: str
    settings: dict
    """Keywords of `tiny.make_trainer`: algorithm, batch, optimizer, samples_per_optimizer_step."""
    layout: dict = field(default_factory=dict)
    """Of the row: leaves of the trainer section, e.g. tensor_model_parallel_size."""


def write_models(directory, architecture="Qwen3", **changes):
    """Policy and reference as Hugging Face directories."""
    for name, seed in (("policy", 0), ("reference", 1)):
        make_model(architecture, seed=seed, **changes).save_pretrained(Path(directory) / name)
    return {name: str(Path(directory) / name) for name in ("policy", "reference")}


def load(path, trained=False):
    """As one process alone would load it."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def settings_of(case):
    """AdamW divides by the gradient's size: at a usual epsilon an entry whose gradient is rounding
    noise would take steps of full length in any direction."""
    own = {**CASES, **WITH_MORE_MODELS}[case]
    return {"optimizer": {"lr": 1e-2, "clip_grad": 0.5, "adam_eps": 1e-5}, **own}


def alone(rank, world, case):
    """One process."""
    return completed(case, load(case.policy), load, ALONE)


def replicated(rank, world, case):
    """Each rank has the whole model."""
    return completed(case, load(case.policy), load, DataParallel(rank, world, dist.group.WORLD))


def completed(case, policy, other, parallel=ALONE):
    """A torch trainer of `policy`, with the further models that the case asks for: `other` makes
    one out of a directory."""
    algorithm, more = case.settings.get("algorithm", {}), {}
    if algorithm.get("advantage_estimator") == "ppo":
        more["critic"] = Critic(
            other(case.reference, trained=True),
            BatchConfig(),
            OptimizerConfig(lr=1e-2, adam_eps=1e-5),
            value_clip=None,
            pad_token_id=0,
            total_optimizer_steps=None,
            parallel=parallel,
        )
    if algorithm.get("loss_type") == "distillation_loss":
        teacher = other(case.reference)
        more["teacher"] = Teacher(
            teacher, BatchConfig(), temperature=1.0, pad_token_id=0, parallel=parallel
        )
    wanted = "use_kl_loss" in algorithm or "kl_coef" in algorithm
    reference = other(case.reference) if wanted else None
    return make_trainer(policy, reference, parallel=parallel, **case.settings, **more)


def trained(rank, world, make, case, steps=(0, STEPS), load_from=None, save_into=None):
    """Metrics of each step and, of rank 0, the weights after the last one by Hugging Face name.

    `load_from`: (directory, facts) of an earlier call's `save_into`, to go on from.
    """
    trainer = maker(make)(rank, world, Case(**case))
    if load_from is not None:
        trainer.load_from(Path(load_from[0]), load_from[1])
    metrics = [trainer.train(rows_of(step), step) for step in range(*steps)]
    weights = {name: tensor.flatten().tolist() for name, tensor in trainer.backend.hf_tensors()}
    facts = None
    if save_into is not None:
        Path(save_into).mkdir(exist_ok=True)
        facts = trainer.save_into(Path(save_into))
    return {"metrics": metrics, "weights": weights if rank == 0 else None, "facts": facts}


def not_finite(rank, world, make, case):
    """What a step does whose gradient is not finite on the last rank alone."""
    trainer = maker(make)(rank, world, Case(**case))
    before = dict(trainer.backend.hf_tensors())
    optimizer = trainer.backend.optimizer
    usual = optimizer.step

    def step():
        if rank == world - 1:
            next(iter(optimizer.main_grads.values())).fill_(torch.nan)
        return usual()

    optimizer.step = step
    metrics = trainer.train(rows_of(0), 0)
    after = dict(trainer.backend.hf_tensors())
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"skipped": metrics["train/skipped_steps"], "same": same, "changed": trainer.changed}


def saved_behind(rank, world, make, case, directory):
    """Whether a state written in the background, while the trainer went on, is that of before."""
    trainer, place = maker(make)(rank, world, Case(**case)), Path(directory)
    trainer.train(rows_of(0), 0)
    facts = trainer.save_into(place / "whole")
    same = trainer.save_into(place / "behind", in_background=True) == facts
    trainer.train(rows_of(1), 1)
    trainer.finish_save()
    kept = []
    for folder in ("whole", "behind"):
        trainer.load_from(place / folder, facts)
        kept.append(dict(trainer.backend.hf_tensors()))
    return same and all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def not_saved_behind(rank, world, make, case, directory):
    """What every rank is told when the last one can't write, and whether the next save is whole."""
    trainer, place = maker(make)(rank, world, Case(**case)), Path(directory)
    trainer.train(rows_of(0), 0)
    last = f"shard-{world:05d}-model-00001-of-00001.safetensors"
    (place / "spoilt" / "policy" / last).mkdir(parents=True, exist_ok=True)
    trainer.save_into(place / "spoilt", in_background=True)
    said = ""
    try:
        trainer.finish_save()
    except CheckpointError as error:
        said = str(error)
    facts = trainer.save_into(place / "whole", in_background=True)
    trainer.finish_save()
    kept = dict(trainer.backend.hf_tensors())
    trainer.train(rows_of(1), 1)
    trainer.load_from(place / "whole", facts)
    again = dict(trainer.backend.hf_tensors())
    return said, trainer.has_saved() and all(torch.equal(kept[n], again[n]) for n in kept)


def in_pieces(rank, world, make, case, most_bytes):
    """Whether weights that are gathered piece by piece are those gathered unit by unit, and the
    most bytes of gathered tensors that were there at once."""
    from dovetail.trainers.torch import sharded

    trainer = maker(make)(rank, world, Case(**case))
    trainer.train(rows_of(0), 0)
    units = dict(trainer.backend.hf_tensors())
    original, now, most = sharded.gathered, 0, 0

    def freed(size):
        nonlocal now
        now -= size

    def watched(*given):
        nonlocal now, most
        found = original(*given)
        now += found.nbytes
        most = max(most, now)
        weakref.finalize(found, freed, found.nbytes)
        return found

    sharded.gathered, trainer.backend.gather_bytes = watched, most_bytes
    try:
        same, names = True, []
        for name, tensor in trainer.backend.hf_tensors():
            same = same and torch.equal(tensor, units[name]) and tensor.dtype == units[name].dtype
            names.append(name)
            del tensor
    finally:
        sharded.gathered = original
    return same and sorted(names) == sorted(units), most


def exported(rank, world, make, case, path):
    """The weights after a step, by the names that one process has for them."""
    trainer, case = maker(make)(rank, world, Case(**case)), Case(**case)
    trainer.train(rows_of(0), 0)
    model = load(case.policy)
    save_hf_tensors(model, trainer.backend.hf_tensors(), None, path, writes=rank == 0)
    dist.barrier()
    read = load(path)
    sent = dict(trainer.backend.hf_tensors())
    again = dict(named_tensors(read))
    assert sent.keys() == again.keys()
    assert all(torch.equal(sent[name], again[name]) for name in sent)
    return {name: p.flatten().tolist() for name, p in read.state_dict().items()}


def maker(name):
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def rows_of(step):
    """With engine logprobs, as a rollout leaves them."""
    rows = make_rows(seed=step, prompts=4, group=3)
    draw = torch.Generator().manual_seed(step)
    for row in rows:
        noise = torch.rand(row.response_length, generator=draw)
        object.__setattr__(row, "rollout_logprobs", (-1 - 3 * noise).tolist())
    return rows
