"""`rollout.rm_hub.gpqa`."""

from dovetail.rewards.gpqa import compute_gpqa_reward

__all__ = ["compute_gpqa_reward"]
