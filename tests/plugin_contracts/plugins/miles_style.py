"""Plugins as one writes them for miles: classes and frozen inputs beside the old functions."""

from miles.rollout.base_types import GenerateFnOutput, RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.utils.types import Sample


class GuessingRollout:
    """A rollout class; it also evaluates."""

    def __init__(self, input):
        self.args, self.data_source = input.args, input.data_source

    async def __call__(self, input):
        groups = self.data_source.get_samples(self.args.rollout_batch_size)
        for sample in (sample for group in groups for sample in group):
            respond(sample, "5")
            sample.reward = 0.5 if sample.index % 2 else 0.0
        if input.evaluation:
            rewards = [group[0].reward for group in groups]
            return RolloutFnEvalOutput(
                data={"five": {"rewards": rewards, "truncated": [False] * len(rewards)}}
            )
        return RolloutFnTrainOutput(samples=groups)


async def generate_rollout(args, rollout_id, *, evaluation=False):
    """The guide's form: no data source, so it brings prompts of its own."""
    groups = [
        [
            respond(Sample(group_index=g, index=4 * g + i, prompt=f"{g}+{i}=", reward=1.0 * i), "3")
            for i in range(args.n_samples_per_prompt)
        ]
        for g in range(args.rollout_batch_size)
    ]
    if evaluation:
        return RolloutFnEvalOutput(data={"own": {"rewards": [1.0], "truncated": [False]}})
    return RolloutFnTrainOutput(samples=groups)


def respond(sample, text):
    """One token per character."""
    sample.tokens = [ord(c) for c in sample.prompt]
    sample.append_response_tokens(
        tokens=[ord(c) for c in text], log_probs=[-0.1] * len(text), text=text
    )
    sample.status = Sample.Status.COMPLETED
    return sample


async def generate(input):
    """The new form: one frozen input."""
    assert input.state.args is input.args
    limit = input.sampling_params["max_new_tokens"]
    return GenerateFnOutput(samples=respond(input.sample, "1234567890123456"[:limit]))


class Generate:
    """The same as a class without constructor arguments."""

    async def __call__(self, input):
        return await generate(input)


def buffer_filter(samples: list[list[Sample]]) -> list[list[Sample]]:
    """The documented form: what stays, in which order."""
    return sorted(samples, key=lambda group: -group[0].group_index)


def process_all(args, samples: list[list[Sample]]) -> None:
    """An all-samples process with two arguments."""
    process_all.count = len(samples)


def postprocess(args):
    """A data postprocess as it is called: with nothing to work on."""
    args.postprocessed = True


def all_keywords_tis(
    args,
    *,
    pg_loss,
    train_log_probs,
    rollout_log_probs,
    loss_masks,
    total_lengths,
    response_lengths,
    parallel_state,
    max_seq_lens,
):
    """A correction that requires the two further keywords."""
    return pg_loss, loss_masks, {}


def model_provider(pre_process=True, post_process=True, vp_stage=None):
    """A Megatron model, or nearly."""
    return {"embeds": pre_process, "has_logits": post_process}


async def agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    """An agent that asks nobody."""
    return {"asked": base_url}
