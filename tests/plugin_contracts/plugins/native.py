"""Plugins in Dovetail's own forms."""

import aiohttp
import torch


async def rollout(call):
    """The built-in rollout, with one number more."""
    output = await call.default(call.rollout_id)
    output.metrics["rollout/mine"] = 1.0
    return output


async def evaluate(call):
    """The built-in evaluation."""
    assert call.evaluation
    return await call.default(call.rollout_id)


async def generate(call):
    """The built-in answer, a tool's observation, and a second answer."""
    sample = await call.default(call.sample, call.sampling)
    note = "[tool: 4]"
    ids = call.tokenizer.encode(note, add_special_tokens=False)
    sample.append_response_tokens(tokens=ids, trainable=False, text=note)
    return sample


async def agent(base_url, prompt, request_kwargs):
    """One turn by HTTP, for the built-in generate function `agent`."""
    question = {"messages": [{"role": "user", "content": prompt}], **request_kwargs}
    where = f"{base_url}/v1/chat/completions"
    async with aiohttp.ClientSession() as client, client.post(where, json=question) as answer:
        answer.raise_for_status()


async def stamp(sample, rollout_id, evaluation):
    """A sample hook that gives the sample back."""
    sample.metadata["stamp"] = (rollout_id, evaluation)
    return sample


def reward(sample):
    """Plain, not async."""
    return len(sample.response) / 10


def rewards(samples):
    """A whole group: ranks by length."""
    order = sorted(range(len(samples)), key=lambda i: samples[i].response_length)
    return [float(order.index(i)) for i in range(len(samples))]


def keep(group):
    """True or false will do."""
    return len({sample.reward for sample in group}) > 1


def longest_first(buffer, num_samples):
    """A buffer filter."""
    buffer.sort(key=lambda group: -sum(sample.response_length for sample in group))
    taken, buffer[:] = buffer[:num_samples], buffer[num_samples:]
    return taken


def remove_wrong(groups):
    """A sample filter."""
    for sample in (sample for group in groups for sample in group):
        sample.remove_sample = not sample.reward


async def look_at_all(groups, data_source):
    """An all-samples process."""
    look_at_all.seen = [len(group) for group in groups]


def source(call):
    """A factory around the built-in data source."""
    return call.default()


def log_rollout(rollout_id, samples, metrics, time_s):
    """Edits the metrics in place."""
    metrics["mine/samples"] = float(len(samples))


def log_eval(rollout_id, data, metrics):
    """Replaces the default logging."""
    return bool(data)


def post_process(samples):
    """Rewards as they are."""
    raw = [float(sample.reward) for sample in samples]
    return raw, raw


def convert(samples):
    """What training needs, and a column of its own."""
    rewards = [float(sample.reward) for sample in samples]
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "loss_masks": [sample.loss_mask for sample in samples],
        "rewards": rewards,
        "raw_reward": rewards,
        "sample_indices": [sample.index for sample in samples],
        "rollout_ids": [sample.index for sample in samples],
        "truncated": [0] * len(samples),
        "mine": [sample.prompt for sample in samples],
    }


def scale_advantages(data):
    """A data postprocess."""
    for advantage in data["advantages"]:
        advantage *= 2


def advantage(data):
    """Gives them back instead of setting them."""
    pairs = zip(data["rewards"], data["response_lengths"], strict=True)
    advantages = [torch.full((length,), float(reward)) for reward, length in pairs]
    return advantages, advantages


def weights(call):
    """No correction at all."""
    return call.pg_loss, call.loss_masks, {}


def reducer(loss_masks, per_token):
    """A mean over all tokens."""
    mask = torch.cat(loss_masks)
    return lambda x: (x * mask).sum() / mask.sum().clamp(min=1)


def loss(call):
    """REINFORCE."""
    pairs = zip(call.logprobs, call.advantages, strict=True)
    value = call.reduce([-logprobs * advantages for logprobs, advantages in pairs])
    return value, {"reinforce": value.detach()}
