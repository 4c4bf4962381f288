"""Dr. GRPO's loss: the sum over tokens by a constant, so that length changes no token's weight.

"Understanding R1-Zero-Like Training: A Critical Perspective" (arXiv:2503.20783), section 3.2. The
reducer's signature is slime's, so the constant stands here: the run's longest response.
"""

import torch

DIVISOR = 8.0
"""rollout_max_response_len of run.toml."""


def get_pg_loss_reducer(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[torch.Tensor],
    calculate_per_token_loss: bool = False,
):
    """A function from per-token values to their sum over all samples, divided by DIVISOR."""
    mask = torch.cat(loss_masks).float()

    def reduce(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum() / DIVISOR

    return reduce
