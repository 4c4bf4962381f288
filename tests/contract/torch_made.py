"""The torch backend's makers for `trained`."""

import torch

from dovetail.config.sections import TrainerConfig
from dovetail.trainers.torch.mesh import make_mesh
from dovetail.trainers.torch.sharded import Sharded
from tests.contract.trained import load
from tests.unit.trainers.tiny import make_trainer


def sharded(rank, world, case):
    """Policy and reference each on all ranks together."""
    config = TrainerConfig(**case.layout)
    mesh = make_mesh(config, rank, world, "cpu")
    how = {"mesh": mesh, "dtype": torch.float32, "cpu_offload": config.fsdp_cpu_offload}
    policy = Sharded(load(case.policy), **how)
    reference = Sharded(load(case.reference), trained=False, **how)
    return make_trainer(policy, reference, **case.settings)
