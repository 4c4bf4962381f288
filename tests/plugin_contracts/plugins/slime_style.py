"""Plugins as one writes them for slime: `args` first, effects by side effect."""

import random
from pathlib import Path

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.utils.http_utils import post
from slime.utils.types import Sample


def answer(args, sample, text):
    """The sample with `text` as its response, one token per character."""
    sample.tokens = sample.tokens or [ord(c) for c in sample.prompt]
    ids = [ord(c) for c in text][: args.rollout_max_response_len]
    sample.append_response_tokens(tokens=ids, log_probs=[-0.5] * len(ids), text=text)
    sample.status = Sample.Status.COMPLETED
    return sample


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    """Answers from a table instead of an engine; a fresh guess for every sample."""
    draw = random.Random(rollout_id)
    groups = data_source.get_samples(args.rollout_batch_size)
    for sample in (sample for group in groups for sample in group):
        answer(args, sample, str(draw.randint(0, 99)))
        sample.reward = float(sample.response == sample.label)
    if evaluation:
        samples = [group[0] for group in groups]
        rewards = [sample.reward for sample in samples]
        data = {"guesses": {"rewards": rewards, "truncated": [False] * len(samples)}}
        return RolloutFnEvalOutput(data=data)
    return RolloutFnTrainOutput(samples=groups, metrics={"guessed": float(len(groups))})


async def custom_generate(args, sample: Sample, sampling_params: dict) -> Sample:
    """Echoes the prompt."""
    return answer(args, sample, str(sample.prompt)[: sampling_params["max_new_tokens"]])


async def generate_by_http(args, sample, sampling_params):
    """Asks the server, two turns with a tool's word between them."""
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    sample.tokens = sample.tokens or [ord(c) for c in sample.prompt]
    for turn in range(2):
        if turn:
            sample.append_response_tokens(tokens=[ord("|")], trainable=False, text="|")
        params = {**sampling_params, "max_new_tokens": 3}
        asked = {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True}
        output = await post(url, asked)
        pairs = output["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args,
            tokens=[token for _, token, *_ in pairs],
            log_probs=[logprob for logprob, *_ in pairs],
            text=output["text"],
            meta_info=output["meta_info"],
        )
    return sample


def stamp(args, sample, rollout_id=None, evaluation=False):
    """A sample hook: notes where the sample was made."""
    sample.metadata["made_in"] = ("eval" if evaluation else "train", rollout_id)


async def custom_rm(args, sample, **kwargs):
    """One point for the right answer."""
    return 1.0 if sample.response.strip() == str(sample.label) else 0.0


async def batched_custom_rm(args, samples: list[Sample], **kwargs) -> list[float]:
    """Points by length, the longest gets one."""
    longest = max(sample.response_length for sample in samples)
    return [sample.response_length / longest for sample in samples]


def keep_mixed(args, samples: list[Sample], **kwargs) -> DynamicFilterOutput:
    """Drops groups that are all right or all wrong."""
    rewards = {sample.get_reward_value(args) for sample in samples}
    return DynamicFilterOutput(keep=len(rewards) > 1, reason="all_equal")


def newest_first(args, rollout_id, buffer, num_samples):
    """A buffer filter, in the form of the call sites."""
    taken = buffer[-num_samples:][::-1]
    del buffer[-num_samples:]
    return taken


def drop_truncated(args, groups):
    """A sample filter over groups."""
    for sample in (sample for group in groups for sample in group):
        sample.remove_sample = sample.status == Sample.Status.TRUNCATED


def count_all(args, all_samples, get_samples):
    """An all-samples process with three arguments."""
    count_all.seen = sum(len(group) for group in all_samples)


def evaluate(args, rollout_id, data_source, evaluation=True):
    """An evaluation function."""
    assert evaluation
    return RolloutFnEvalOutput(data={"one": {"rewards": [1.0, 0.0], "truncated": [False, True]}})


def log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    """Adds a number and lets the default logging go on."""
    if rollout_extra_metrics is not None:
        rollout_extra_metrics["mine/longest"] = max(s.response_length for s in samples)
    return False


def log_eval(rollout_id, args, data, extra_metrics):
    """Replaces the default logging."""
    log_eval.last = {name: sum(one["rewards"]) for name, one in data.items()}
    return True


def centre(args, samples):
    """A reward post-process: minus the mean of the whole step."""
    raw = [sample.get_reward_value(args) for sample in samples]
    mean = sum(raw) / len(raw)
    return raw, [reward - mean for reward in raw]


def convert(args, samples):
    """The conversion of the guide: without rollout_ids."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": rewards,
        "raw_reward": rewards,
        "truncated": [int(sample.status == Sample.Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [sample.loss_mask or [1] * sample.response_length for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "metadata": [sample.train_metadata for sample in samples],
    }


def mask_long(args, rollout_id, rollout_data):
    """A data postprocess in the form of the call site: trains on short responses only."""
    for mask, length in zip(
        rollout_data["loss_masks"], rollout_data["response_lengths"], strict=True
    ):
        if length > 8:
            mask[:] = 0


def advantage(args, rollout_data):
    """Every token gets its sample's reward."""
    import torch

    pairs = zip(rollout_data["rewards"], rollout_data["response_lengths"], strict=True)
    rollout_data["advantages"] = [torch.full((n,), float(reward)) for reward, n in pairs]
    rollout_data["returns"] = rollout_data["advantages"]


def truncated_weights(
    args,
    *,
    pg_loss,
    train_log_probs,
    rollout_log_probs,
    loss_masks,
    total_lengths,
    response_lengths,
    **kwargs,
):
    """Importance weights, at most 2."""
    import torch

    weights = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp().clamp(max=2.0)
    return pg_loss * weights, loss_masks, {"tis": weights}


def constant_divisor(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Sums instead of means."""
    import torch

    mask = torch.cat(loss_masks)
    return lambda x: (x * mask).sum() / 100


class Prompts:
    """A data source without a base class."""

    def __init__(self, args):
        self.args, self.next_group, self.waiting = args, 0, []

    def get_samples(self, num_samples):
        groups, self.waiting = self.waiting[:num_samples], self.waiting[num_samples:]
        while len(groups) < num_samples:
            groups.append(self._group(self.next_group))
            self.next_group += 1
        return groups

    def _group(self, number):
        n = self.args.n_samples_per_prompt
        return [
            Sample(
                group_index=number, index=number * n + i, prompt=f"{number}+1=", label=number + 1
            )
            for i in range(n)
        ]

    def add_samples(self, samples):
        self.waiting += samples

    def save(self, rollout_id):
        self._file(rollout_id).write_text(str(self.next_group))

    def load(self, rollout_id=None):
        if self.args.load and self._file(rollout_id).is_file():
            self.next_group = int(self._file(rollout_id).read_text())

    def _file(self, rollout_id):
        return Path(self.args.load or self.args.save) / f"prompts_{rollout_id}.txt"

    def __len__(self):
        return 1000


def loss(args, batch, logits, sum_of_sample_mean):
    """REINFORCE on the logits, the tokens of all samples one after the other."""
    import torch

    logprobs, start = [], 0
    lengths = zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True)
    for tokens, length in lengths:
        end = start + len(tokens)
        before = logits[0, end - length - 1 : end - 1]
        chosen = tokens[-length:].unsqueeze(-1)
        logprobs.append(before.log_softmax(-1).gather(-1, chosen).squeeze(-1))
        start = end
    value = -sum_of_sample_mean(torch.cat(logprobs) * torch.cat(batch["advantages"]))
    return value, {"reinforce": value.detach()}


def before_log_prob(args, model, store_prefix):
    """A hook of a Megatron trainer."""
    args.last_prefix = store_prefix


class Middleware:
    """A class between the router and its requests."""

    def __init__(self, app, *, router):
        self.app, self.router = app, router

    async def dispatch(self, request, call_next):
        return await call_next(request)
