"""`rollout.rm_hub.f1`."""

from dovetail.rewards.f1 import f1_score, normalize_answer

__all__ = ["f1_score", "normalize_answer"]
