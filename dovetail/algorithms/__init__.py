"""Advantages, losses, KL and logprobs: pure tensor functions, and the tables that name them."""
