"""The torch backend's makers for `trained`."""

from dovetail.config.sections import ModelConfig, TrainerConfig
from dovetail.trainers.torch.load import load_sharded
from dovetail.trainers.torch.lora import add_adapters
from dovetail.trainers.torch.mesh import make_mesh
from tests.contract.trained import load
from tests.unit.trainers.tiny import make_trainer

MODEL = {"dtype": "float32"}


def sharded(rank, world, case, **model):
    """Policy and reference each on all ranks together, none of which ever has one whole."""
    config, own = TrainerConfig(**case.layout), ModelConfig(**{**MODEL, **model})
    mesh = make_mesh(config, rank, world, "cpu")
    policy = load_sharded(case.policy, mesh, own, config, adapted=True)
    reference = policy
    if not config.lora_rank:
        reference = load_sharded(case.reference, mesh, own, config, trained=False)
    return make_trainer(policy, reference, **case.settings)


def recomputing(rank, world, case):
    """With activations computed again in the backward pass."""
    return sharded(rank, world, case, gradient_checkpointing=True)


def adapted(rank, world, case):
    """One process that trains adapters; its reference is the policy without them."""
    policy = load(case.policy)
    add_adapters(policy, TrainerConfig(**case.layout), ModelConfig().seed)
    return make_trainer(policy, policy, **case.settings)
