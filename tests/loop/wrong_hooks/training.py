"""Wrong functions of training: conversion, advantages, losses, corrections."""

from __future__ import annotations

from tests.loop.wrong_hooks.row import Wrong

_TIS = ("--use-tis",)
_LOSS = ("--loss-type", "custom_loss")

TRAINING = (
    Wrong(
        "conversion with lists of two lengths",
        "custom_convert_samples_to_train_data",
        """
        def hook(args, samples):
            return {
                "tokens": [s.tokens for s in samples],
                "response_lengths": [s.response_length for s in samples],
                "rewards": [1.0],
                "loss_masks": [s.loss_mask for s in samples],
            }
        """,
        ("rewards 1",),
    ),
    Wrong(
        "conversion without rewards",
        "custom_convert_samples_to_train_data",
        "def hook(args, samples):\n    return {'tokens': [s.tokens for s in samples]}\n",
        ("without response_lengths",),
    ),
    Wrong(
        "postprocess drops a row of one column",
        "rollout_data_postprocess",
        "def hook(args, rollout_id, rollout_data):\n    rollout_data['advantages'].pop()\n",
        ("advantages", "7"),
    ),
    Wrong(
        "postprocess leaves a mask of another length on samples",
        "rollout_data_postprocess",
        """
        def hook(args, samples):
            for sample in (sample for group in samples for sample in group):
                sample.loss_mask = [1]
        """,
        ("loss_mask has 1 entries, expected 12",),
    ),
    Wrong(
        "postprocess leaves a number for a mask on samples",
        "rollout_data_postprocess",
        """
        def hook(args, samples):
            for sample in (sample for group in samples for sample in group):
                sample.loss_mask = 1
        """,
        ("loss_mask is 1, expected a list of 12 entries",),
    ),
    Wrong(
        "advantages are not set",
        "custom_advantage_function",
        "def hook(args, rollout_data):\n    return None\n",
        ('data["advantages"] is not set',),
    ),
    Wrong(
        "advantages of a wrong length",
        "custom_advantage_function",
        """
        import torch
        def hook(args, rollout_data):
            rollout_data["advantages"] = [torch.ones(2) for _ in rollout_data["tokens"]]
        """,
        ("shape (2,)",),
    ),
    Wrong(
        "loss is a number",
        "custom_loss_function",
        "def hook(call):\n    return 1.0, {}\n",
        ("float", "scalar tensor"),
        flags=_LOSS,
    ),
    Wrong(
        "loss has no gradient",
        "custom_loss_function",
        "def hook(call):\n    return call.reduce(call.old_logprobs), {}\n",
        ("without a gradient",),
        flags=_LOSS,
    ),
    Wrong(
        "correction forgets the masks",
        "custom_tis_function",
        """
        def hook(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
            return pg_loss, {}
        """,
        ("tuple", "loss masks"),
        flags=_TIS,
    ),
    Wrong(
        "reducer is a number",
        "custom_pg_loss_reducer_function",
        "def hook(total_lengths, response_lengths, masks, per_token):\n    return 3.0\n",
        ("float: 3.0",),
    ),
    Wrong(
        "reducer does not reduce",
        "custom_pg_loss_reducer_function",
        "def hook(total_lengths, response_lengths, masks, per_token):\n    return lambda x: x\n",
        ("shape",),
    ),
)
