"""The trainer on plain torch, one process."""
