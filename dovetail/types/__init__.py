"""What flows through the pipeline: records, calls, ports and errors. Standard library only."""

from dovetail.types.calls import (
    DynamicFilterOutput,
    EvalOutput,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    RolloutOutput,
    SamplingParams,
    VersionSpan,
)
from dovetail.types.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DovetailError,
    EngineError,
    HookError,
    MissingExtraError,
    RequestTooLongError,
    RewardError,
    TrainError,
    UsageError,
)
from dovetail.types.sample import Group, PrefixCacheInfo, Sample, SpecInfo

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DovetailError",
    "DynamicFilterOutput",
    "EngineError",
    "EvalOutput",
    "FinishReason",
    "GenerateRequest",
    "GenerateResult",
    "Group",
    "HookError",
    "MissingExtraError",
    "PrefixCacheInfo",
    "RequestTooLongError",
    "RewardError",
    "RolloutOutput",
    "Sample",
    "SamplingParams",
    "SpecInfo",
    "TrainError",
    "UsageError",
    "VersionSpan",
]
