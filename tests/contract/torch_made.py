"""The torch backend's makers for `trained`."""

from dovetail.config.sections import ModelConfig, TrainerConfig
from dovetail.trainers.torch.load import load_sharded
from dovetail.trainers.torch.lora import add_adapters
from dovetail.trainers.torch.mesh import make_mesh
from tests.contract.trained import completed, load
from tests.unit.trainers.tiny import make_trainer

MODEL = {"dtype": "float32"}


def sharded(rank, world, case, **model):
    """Policy and reference each on all ranks together, none of which ever has one whole."""
    config, own = TrainerConfig(**case.layout), ModelConfig(**{**MODEL, **model})
    mesh = make_mesh(config, rank, world, "cpu")
    policy = load_sharded(case.policy, mesh, own, config, adapted=True)
    if config.lora_rank:
        return make_trainer(policy, policy, **case.settings)

    def other(path, trained=False):
        return load_sharded(path, mesh, own, config, trained=trained)

    return completed(case, policy, other)


def recomputing(rank, world, case):
    """With activations computed again in the backward pass."""
    return sharded(rank, world, case, gradient_checkpointing=True)


def adapted(rank, world, case):
    """One process that trains adapters; its reference is the policy without them."""
    policy = load(case.policy)
    add_adapters(policy, TrainerConfig(**case.layout), ModelConfig().seed)
    return make_trainer(policy, policy, **case.settings)


def low(rank, world, case):
    """Passes in bfloat16, float32 shards."""
    return sharded(rank, world, case, dtype="bfloat16")


def low_alone(rank, world, case):
    """As `low`, in one process."""
    return make_trainer(load(case.policy).bfloat16(), None, **case.settings)
