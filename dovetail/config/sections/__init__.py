"""Every knob of a run, declared once: type, default, bounds, one line of help.

Flags, TOML keys, `--help`, the reference page and the checks are read from these declarations. Leaf
names are unique over the whole tree, so a flag is `--` plus the leaf name with dashes. Where the
slime family has a name for the same thing, it is the name here.

One module per section; the sections are imported from here.
"""

from dovetail.config.sections.algorithm import AlgorithmConfig
from dovetail.config.sections.base import Section
from dovetail.config.sections.batch import BatchConfig
from dovetail.config.sections.checkpoint import CheckpointConfig
from dovetail.config.sections.critic import CriticConfig
from dovetail.config.sections.data import DataConfig
from dovetail.config.sections.debug import DebugConfig
from dovetail.config.sections.distillation import DistillationConfig
from dovetail.config.sections.engine import EngineConfig
from dovetail.config.sections.eval import EvalConfig
from dovetail.config.sections.hooks import HooksConfig
from dovetail.config.sections.model import ModelConfig
from dovetail.config.sections.observe import ObserveConfig
from dovetail.config.sections.optimizer import OptimizerConfig
from dovetail.config.sections.reward import RewardConfig
from dovetail.config.sections.rollout import RolloutConfig
from dovetail.config.sections.router import RouterConfig
from dovetail.config.sections.runtime import RuntimeConfig
from dovetail.config.sections.session import SessionConfig
from dovetail.config.sections.trainer import TrainerConfig

__all__ = [
    "Section",
    "ModelConfig",
    "DataConfig",
    "RolloutConfig",
    "EngineConfig",
    "RewardConfig",
    "AlgorithmConfig",
    "CriticConfig",
    "DistillationConfig",
    "BatchConfig",
    "OptimizerConfig",
    "CheckpointConfig",
    "EvalConfig",
    "ObserveConfig",
    "DebugConfig",
    "HooksConfig",
    "RouterConfig",
    "SessionConfig",
    "TrainerConfig",
    "RuntimeConfig",
]
