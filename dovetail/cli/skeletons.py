"""What `dovetail hooks new` writes for the slime family's forms: one working function per hook."""

from __future__ import annotations

from textwrap import dedent

_RAW: dict[str, str] = {
    "data_source": """
        from slime.utils.types import Sample


        class Source:
            def __init__(self, args):
                self.args = args
                self.next_group = self.next_sample = 0
                self.returned = []

            def get_samples(self, num_samples):
                groups, self.returned = self.returned[:num_samples], self.returned[num_samples:]
                while len(groups) < num_samples:
                    groups.append(self.fresh_group())
                return groups

            def fresh_group(self):
                # One prompt, n_samples_per_prompt times; index and group_index count on and on.
                group = []
                for _ in range(self.args.n_samples_per_prompt):
                    group.append(
                        Sample(
                            group_index=self.next_group,
                            index=self.next_sample,
                            prompt=f"{self.next_group}+1=",
                            label=str(self.next_group + 1),
                        )
                    )
                    self.next_sample += 1
                self.next_group += 1
                return group

            def add_samples(self, samples):
                # Groups that the step did not need: serve them again.
                self.returned += samples

            def save(self, rollout_id):
                # Write what `load` needs, e.g. under args.save.
                pass

            def load(self, rollout_id=None):
                pass
        """,
    "buffer_filter": """
        def take(args, rollout_id, buffer, num_samples):
            # `buffer` is changed in place: what is returned must leave it.
            taken = buffer[:num_samples]
            del buffer[:num_samples]
            return taken
        """,
    "rollout_function": """
        from slime.utils.types import Sample


        def generate_rollout(args, rollout_id, data_source, evaluation=False):
            groups = data_source.get_samples(args.rollout_batch_size)
            for group in groups:
                for sample in group:
                    # Put your own way of making a response and a reward here.
                    if not sample.tokens:
                        sample.tokens = [ord(letter) % 50 for letter in str(sample.prompt)]
                    sample.append_response_tokens(
                        args, tokens=[5, 6], log_probs=[-0.1, -0.2], text="ok"
                    )
                    sample.reward = 0.0
                    sample.status = Sample.Status.COMPLETED
            return groups
        """,
    "eval_function": """
        def evaluate(args, rollout_id, data_source, evaluation=True):
            rewards, truncated = [], []
            for group in data_source.get_samples(2):
                # Put your own way of answering and scoring here.
                rewards.append(0.0)
                truncated.append(False)
            return {"my_set": {"rewards": rewards, "truncated": truncated}}
        """,
    "custom_generate_function": """
        from slime.rollout.sglang_rollout import GenerateState
        from slime.utils.http_utils import post
        from slime.utils.types import Sample


        async def generate(args, sample, sampling_params, evaluation=False):
            state = GenerateState(args)
            if not sample.tokens:
                sample.tokens = state.tokenizer.encode(sample.prompt)
            url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
            payload = {
                "input_ids": sample.tokens,
                "sampling_params": sampling_params,
                "return_logprob": True,
            }
            output = await post(url, payload)
            # Tokens that you add yourself (observations) are appended with trainable=False.
            sample.append_response_tokens(
                args, text=output["text"], meta_info=output["meta_info"]
            )
            if sample.status is Sample.Status.PENDING:
                sample.status = Sample.Status.COMPLETED
            return sample
        """,
    "rollout_sample_hook": """
        def look(args, sample, *, rollout_id, evaluation):
            # Give back another Sample to replace this one, or nothing to keep it.
            sample.metadata["long"] = sample.response_length > 512
        """,
    "dynamic_sampling_filter": """
        from slime.rollout.filter_hub.base_types import DynamicFilterOutput


        def keep_mixed(args, group, **kwargs):
            rewards = [sample.get_reward_value(args) for sample in group]
            return DynamicFilterOutput(keep=len(set(rewards)) > 1, reason="equal_rewards")
        """,
    "rollout_sample_filter": """
        def drop_truncated(args, groups):
            # Only what is set on the samples counts; the return value is ignored.
            for group in groups:
                for sample in group:
                    sample.remove_sample = sample.status == type(sample).Status.TRUNCATED
        """,
    "rollout_all_samples_process": """
        def process(args, all_samples, get_samples):
            # Groups that a filter dropped are here too. get_samples(n) gives further prompts.
            lengths = [sample.response_length for group in all_samples for sample in group]
            print("responses of", min(lengths), "to", max(lengths), "tokens")
        """,
    "custom_rollout_log_function": """
        def log_rollout(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
            if rollout_extra_metrics is not None:
                longest = max(sample.response_length for sample in samples)
                rollout_extra_metrics["rollout/longest"] = longest
            # True would leave the built-in metrics out.
            return False
        """,
    "custom_eval_rollout_log_function": """
        def log_eval(rollout_id, args, data, extra_metrics):
            for name, columns in data.items():
                if extra_metrics is not None and columns["rewards"]:
                    extra_metrics[f"eval/{name}/best"] = max(columns["rewards"])
            return False
        """,
    "custom_rm": """
        async def reward(args, sample, **kwargs):
            # A number, or with --reward-key a dict. With --group-rm the second parameter is
            # `samples`, and a list of one reward per sample is returned.
            return 1.0 if str(sample.label) in sample.response else 0.0
        """,
    "custom_reward_post_process": """
        def post_process(args, samples):
            raw = [float(sample.get_reward_value(args)) for sample in samples]
            groups = {}
            for sample, value in zip(samples, raw):
                groups.setdefault(sample.group_index, []).append(value)
            means = {index: sum(values) / len(values) for index, values in groups.items()}
            centred = [value - means[s.group_index] for s, value in zip(samples, raw)]
            # The first list is logged, the second is what advantages start from.
            return raw, centred
        """,
    "custom_convert_samples_to_train_data": """
        def convert(args, samples):
            masks = []
            for sample in samples:
                mask = sample.loss_mask or [1] * sample.response_length
                masks.append([0] * len(mask) if sample.remove_sample else mask)
            # Every key reaches the loss; keys of your own too.
            return {
                "tokens": [sample.tokens for sample in samples],
                "response_lengths": [sample.response_length for sample in samples],
                "rewards": [float(sample.get_reward_value(args)) for sample in samples],
                "loss_masks": masks,
                "sample_indices": [sample.index for sample in samples],
                "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
            }
        """,
    "rollout_data_postprocess": """
        def postprocess(args, rollout_id, rollout_data):
            # Lists with one entry per sample, changed in place.
            for place, advantage in enumerate(rollout_data["advantages"]):
                rollout_data["advantages"][place] = advantage.clamp(-5.0, 5.0)
        """,
    "custom_advantage_function": """
        def advantages(args, rollout_data):
            made = []
            for reward, mask in zip(rollout_data["rewards"], rollout_data["loss_masks"]):
                made.append(mask.float() * float(reward))
            rollout_data["advantages"] = made
            rollout_data["returns"] = [value.clone() for value in made]
        """,
    "custom_loss_function": """
        import torch


        def loss(args, batch, logits, sum_of_sample_mean):
            log_probs, end = [], 0
            sizes = zip(batch["total_lengths"], batch["response_lengths"])
            for tokens, (total, response) in zip(batch["unconcat_tokens"], sizes):
                # The logits of a position predict the token after it.
                end += total
                rows = logits[0, end - response - 1 : end - 1].float() / args.rollout_temperature
                chosen = torch.log_softmax(rows, -1).gather(1, tokens[-response:, None])
                log_probs.append(chosen[:, 0])
            advantages = torch.cat(batch["advantages"])
            value = sum_of_sample_mean(-torch.cat(log_probs) * advantages)
            return value, {"loss": value.detach()}
        """,
    "custom_tis_function": """
        import torch


        def correct(
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
            ratio = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()
            weights = ratio.clamp(max=2.0).detach()
            # The masks that are returned are the ones the loss is averaged under.
            return pg_loss * weights, loss_masks, {"tis": ratio.detach()}
        """,
    "custom_pg_loss_reducer_function": """
        import torch


        def reducer(total_lengths, response_lengths, pg_loss_masks, calculate_per_token_loss):
            mask = torch.cat(pg_loss_masks).float()
            return lambda values: (values * mask).sum() / 1024
        """,
}

SLIME: dict[str, str] = {slot: dedent(text).strip("\n") + "\n" for slot, text in _RAW.items()}
"""By slot, in slime's spelling; vime's differs in the names of its modules only."""

_MILES_RAW: dict[str, str] = {
    "rollout_function": """
        from miles.rollout.base_types import RolloutFnTrainOutput
        from miles.utils.types import Sample


        class Rollout:
            def __init__(self, input):
                self.args, self.data_source = input.args, input.data_source

            async def __call__(self, input):
                groups = self.data_source.get_samples(self.args.rollout_batch_size)
                for group in groups:
                    for sample in group:
                        # Put your own way of making a response and a reward here.
                        if not sample.tokens:
                            sample.tokens = [ord(letter) % 50 for letter in str(sample.prompt)]
                        sample.tokens = sample.tokens + [5, 6]
                        sample.response, sample.response_length = "ok", 2
                        sample.rollout_log_probs = [-0.1, -0.2]
                        sample.reward = 0.0
                        sample.status = Sample.Status.COMPLETED
                return RolloutFnTrainOutput(samples=groups, metrics={})
        """,
    "eval_function": """
        from miles.rollout.base_types import RolloutFnEvalOutput


        class Evaluate:
            def __init__(self, input):
                self.args, self.data_source = input.args, input.data_source

            async def __call__(self, input):
                # Put your own way of answering and scoring here.
                return RolloutFnEvalOutput(
                    data={"my_set": {"rewards": [0.0], "truncated": [False]}}
                )
        """,
    "custom_generate_function": """
        from miles.rollout.base_types import GenerateFnOutput
        from miles.utils.http_utils import post


        async def generate(input):
            args, sample = input.args, input.sample
            if not sample.tokens:
                sample.tokens = input.state.tokenizer.encode(sample.prompt)
            url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
            payload = {
                "input_ids": sample.tokens,
                "sampling_params": input.sampling_params,
                "return_logprob": True,
            }
            output = await post(url, payload)
            pairs = output["meta_info"]["output_token_logprobs"]
            sample.tokens = sample.tokens + [token for _, token, *_ in pairs]
            sample.response += output["text"]
            sample.response_length += len(pairs)
            sample.rollout_log_probs = [log_prob for log_prob, *_ in pairs]
            sample.update_from_meta_info(args, output["meta_info"])
            return GenerateFnOutput(samples=sample)
        """,
    "rollout_data_postprocess": """
        def postprocess(args):
            # Miles hands over nothing but the arguments.
            args.postprocessed = True
        """,
}

_VIME_RAW: dict[str, str] = {
    "custom_generate_function": """
        from vime.rollout.vllm_rollout import GenerateState
        from vime.utils.http_utils import post
        from vime.utils.types import Sample

        FINISHED = {"length": Sample.Status.TRUNCATED, "abort": Sample.Status.ABORTED}


        async def generate(args, sample, sampling_params, evaluation=False):
            state = GenerateState(args)
            if not sample.tokens:
                sample.tokens = state.tokenizer.encode(sample.prompt)
            url = f"http://{args.vllm_router_ip}:{args.vllm_router_port}/inference/v1/generate"
            payload = {
                "model": args.hf_checkpoint,
                "token_ids": sample.tokens,
                "sampling_params": {
                    "max_tokens": sampling_params["max_new_tokens"],
                    "temperature": sampling_params["temperature"],
                    "logprobs": 1,
                },
            }
            choice = (await post(url, payload))["choices"][0]
            # Tokens that you add yourself (observations) are appended with trainable=False.
            sample.append_response_tokens(
                args,
                tokens=choice["token_ids"],
                log_probs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
                text=state.tokenizer.decode(choice["token_ids"], skip_special_tokens=True),
            )
            sample.status = FINISHED.get(choice["finish_reason"], Sample.Status.COMPLETED)
            return sample
        """,
}

VIME: dict[str, str] = {slot: dedent(text).strip("\n") + "\n" for slot, text in _VIME_RAW.items()}
"""Where vime's engine is asked in another way."""

MILES: dict[str, str] = {slot: dedent(text).strip("\n") + "\n" for slot, text in _MILES_RAW.items()}
"""Where miles' own form is not slime's."""
