"""Hooks of advantages and of the loss."""

from __future__ import annotations

from dovetail.hooks.rows.families import FOREIGN
from dovetail.hooks.spec import CallForm, HookSpec

_CORRECTED = (
    "args",
    "pg_loss",
    "train_log_probs",
    "rollout_log_probs",
    "loss_masks",
    "total_lengths",
    "response_lengths",
)

ALGORITHMS: tuple[HookSpec, ...] = (
    HookSpec(
        slot="custom_advantage_function",
        stage="algorithms",
        process="trainer",
        forms=(
            CallForm(families=("native",), positional=("data",)),
            CallForm(families=FOREIGN, positional=("args", "rollout_data")),
        ),
        default="the advantages of --advantage-estimator",
        returns=(
            'nothing, with data["advantages"] and data["returns"] set: lists of [response_length] '
            "tensors; or a tuple of these two; or one list that is both"
        ),
        when="once per step, when logprobs, reference logprobs and KL are known",
        doc=(
            "Replaces the estimator. `data` has tokens, rewards, response_lengths, loss_masks, "
            "log_probs, ref_log_probs, kl and what a custom conversion added, each a list with one "
            "entry per row. Whitening (--normalize-advantages) still applies."
        ),
        example=(
            "def advantages(data):\n"
            "    made = []\n"
            '    for mask, reward in zip(data["loss_masks"], data["rewards"]):\n'
            "        made.append(mask.float() * float(reward))\n"
            '    data["advantages"] = data["returns"] = made\n'
        ),
        example_name="advantages",
        runs_async=False,
    ),
    HookSpec(
        slot="custom_loss_function",
        stage="algorithms",
        process="trainer",
        forms=(
            CallForm(families=("native",), positional=("call",)),
            CallForm(
                families=FOREIGN,
                positional=("args", "batch", "logits", "sum_of_sample_mean"),
            ),
        ),
        default="policy_loss",
        returns="(loss, metrics): a scalar tensor and a dict of scalar tensors",
        when="for every micro-batch, with --loss-type custom_loss",
        doc=(
            "The loss is a sum over rollouts; `call.reduce` makes it from per-token values. `call` "
            "(a `LossCall`) has logprobs with gradient, old, reference and rollout logprobs, "
            "advantages, masks, rewards, metadata, train_metadata, and `data` with every key of "
            "the training data. The family's form gets untempered logits [1, tokens, vocabulary] "
            "of whole sequences end to end, and a batch dict (get_log_probs_and_entropy in "
            "dovetail.algorithms.packed_logits takes them apart). Metrics are summed like the loss."
        ),
        example=(
            "def loss(call):\n"
            "    terms = []\n"
            "    rows = zip(call.logprobs, call.old_logprobs, call.advantages)\n"
            "    for logprobs, old, advantage in rows:\n"
            "        terms.append(-(logprobs - old).exp() * advantage)\n"
            "    value = call.reduce(terms)\n"
            '    return value, {"mine": value.detach()}\n'
        ),
        example_name="loss",
        runs_async=False,
    ),
    HookSpec(
        slot="custom_tis_function",
        stage="algorithms",
        process="trainer",
        forms=(
            CallForm(families=("native",), positional=("call",)),
            CallForm(
                families=FOREIGN,
                named=_CORRECTED,
                keywords=("parallel_state", "max_seq_lens"),
                to_var_keywords=True,
                origin="by keyword; parallel_state and max_seq_lens are miles'",
            ),
        ),
        default="truncated importance sampling between --tis-clip-low and --tis-clip",
        returns="(pg_loss, loss masks, metrics): flat tensor, list of tensors, dict",
        when="for every micro-batch, with --use-tis or --get-mismatch-metrics",
        doc=(
            "Corrects for the difference between the engine that sampled and the trainer. "
            "`pg_loss` is flat over the response tokens of all samples; logprobs and masks are "
            "lists, one [response_length] tensor per sample. The masks that it returns are the "
            "reducer's. Metrics are per-token tensors and are averaged under the masks that it got."
        ),
        example=(
            "import torch\n"
            "\n"
            "\n"
            "def weigh(call):\n"
            "    gap = torch.cat(call.train_log_probs) - torch.cat(call.rollout_log_probs)\n"
            "    weight = gap.exp().clamp(max=2.0)\n"
            '    return call.pg_loss * weight, call.loss_masks, {"weight": weight}\n'
        ),
        example_name="weigh",
        runs_async=False,
        registered={
            name: f"dovetail.algorithms.corrections:{name}"
            for name in ("vanilla_tis_function", "icepop_function")
        },
    ),
    HookSpec(
        slot="custom_pg_loss_reducer_function",
        stage="algorithms",
        process="trainer",
        forms=(
            CallForm(families=("native",), positional=("loss_masks", "per_token")),
            CallForm(
                families=FOREIGN,
                positional=(
                    "total_lengths",
                    "response_lengths",
                    "pg_loss_masks",
                    "calculate_per_token_loss",
                ),
            ),
        ),
        default="the sum over rollouts of their token means, or with "
        "--calculate-per-token-loss the sum over tokens",
        returns="a function from a flat tensor of per-token values to a scalar tensor",
        when="for every micro-batch",
        doc=(
            "Makes the function that reduces the policy loss, and nothing else, to a scalar. The "
            "masks are those that a correction (--custom-tis-function-path) gave back."
        ),
        example=(
            "import torch\n"
            "\n"
            "\n"
            "def constant_divisor(loss_masks, per_token):\n"
            "    mask = torch.cat(loss_masks).float()\n"
            "    return lambda values: (values * mask).sum() / 1024\n"
        ),
        example_name="constant_divisor",
        runs_async=False,
    ),
)
