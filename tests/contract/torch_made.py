"""The torch backend's makers for `trained`."""

from dovetail.config.sections import TrainerConfig
from dovetail.trainers.torch.load import load_sharded
from dovetail.trainers.torch.mesh import make_mesh
from tests.unit.trainers.tiny import make_trainer


def sharded(rank, world, case):
    """Policy and reference each on all ranks together, none of which ever has one whole."""
    config = TrainerConfig(**case.layout)
    mesh = make_mesh(config, rank, world, "cpu")
    how = {"cpu_offload": config.fsdp_cpu_offload}
    policy = load_sharded(case.policy, mesh, "float32", **how)
    reference = load_sharded(case.reference, mesh, "float32", trained=False, **how)
    return make_trainer(policy, reference, **case.settings)
