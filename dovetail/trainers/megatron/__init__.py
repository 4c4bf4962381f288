"""Megatron-core as a training backend."""
