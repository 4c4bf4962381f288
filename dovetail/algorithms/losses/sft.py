"""Supervised fine-tuning."""

from __future__ import annotations

import torch

from dovetail.algorithms.inputs import TokenInputs
from dovetail.config.sections import AlgorithmConfig


def sft_loss(
    inputs: TokenInputs, config: AlgorithmConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross entropy `-logprob` of each response token, [N]."""
    return -inputs.logprobs_N, {"entropy": inputs.entropy_N}
