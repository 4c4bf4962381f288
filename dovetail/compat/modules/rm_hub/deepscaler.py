"""`rollout.rm_hub.deepscaler`."""

from dovetail.rewards.deepscaler import get_deepscaler_rule_based_reward

__all__ = ["get_deepscaler_rule_based_reward"]
