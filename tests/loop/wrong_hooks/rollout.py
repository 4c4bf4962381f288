"""Wrong functions of the rollout: rewards, filters, generation, sources, evaluation."""

from __future__ import annotations

from tests.loop.wrong_hooks.row import Wrong

_RM = "custom_rm"
_GENERATE = "custom_generate_function"
_FILTER = "dynamic_sampling_filter"
_TIS = ("--use-tis",)

REWARDS = (
    Wrong(
        "returns None", _RM, "def hook(sample):\n    sample.reward = 1.0\n", ("None", "a return")
    ),
    Wrong("returns text", _RM, "def hook(sample):\n    return 'good'\n", ("str 'good'",)),
    Wrong("returns NaN", _RM, "def hook(sample):\n    return float('nan')\n", ("NaN",)),
    Wrong(
        "returns an object without --reward-key",
        _RM,
        "def hook(sample):\n    return {'score': 1.0}\n",
        ("'score'", "--reward-key"),
    ),
    Wrong(
        "returns an object without the entry",
        _RM,
        "def hook(sample):\n    return {'score': 1.0}\n",
        ("'acc'",),
        flags=("--reward-key", "acc"),
    ),
    Wrong(
        "forgets to await what it returns",
        _RM,
        """
        async def judge(sample):
            return 1.0
        async def hook(sample):
            return judge(sample)
        """,
        ("coroutine", "await"),
    ),
    Wrong(
        "forgets to await on the way",
        _RM,
        """
        async def note(sample):
            pass
        def hook(sample):
            note(sample)
            return 1.0
        """,
        ("forgets an await", "'note'"),
    ),
    Wrong(
        "has a yield in it",
        _RM,
        "def hook(sample):\n    yield 1.0\n",
        ("generator", "yield"),
    ),
    Wrong(
        "changes the tokens",
        _RM,
        "def hook(sample):\n    sample.tokens.append(5)\n    return 1.0\n",
        ("sample.tokens",),
    ),
    Wrong(
        "list of another length",
        _RM,
        "def hook(args, samples):\n    return [1.0]\n",
        ("1 reward", "4"),
        flags=("--group-rm", "--n-samples-per-prompt", "4"),
    ),
    Wrong(
        "one number for a group",
        _RM,
        "def hook(args, samples):\n    return 1.0\n",
        ("float",),
        flags=("--group-rm", "--n-samples-per-prompt", "4"),
    ),
    Wrong(
        "post-process gives one list",
        "custom_reward_post_process",
        "def hook(args, samples):\n    return [1.0 for _ in samples]\n",
        ("two lists",),
    ),
    Wrong(
        "post-process gives short lists",
        "custom_reward_post_process",
        "def hook(args, samples):\n    return [1.0], [1.0]\n",
        ("1 raw rewards",),
    ),
)

FILTERS = (
    Wrong("verdict None", _FILTER, "def hook(args, group):\n    pass\n", ("None", "DynamicFilter")),
    Wrong(
        "verdict in words",
        _FILTER,
        "def hook(args, group):\n    return 'keep'\n",
        ("str ('keep')",),
    ),
    Wrong(
        "buffer filter leaves its groups in the buffer",
        "buffer_filter",
        "def hook(args, rollout_id, buffer, num_samples):\n    return buffer[:num_samples]\n",
        ("mutates nothing",),
    ),
    Wrong(
        "buffer filter takes too many",
        "buffer_filter",
        """
        def hook(args, rollout_id, buffer, num_samples):
            taken = list(buffer)
            buffer.clear()
            return taken
        """,
        ("3 groups", "at most 2"),
    ),
    Wrong(
        "sample filter returns what it should set",
        "rollout_sample_filter",
        "def hook(args, groups):\n    return [g for g in groups if g[0].reward]\n",
        ("mutates nothing", "remove_sample"),
    ),
    Wrong(
        "sample hook returns a number",
        "rollout_sample_hook",
        "def hook(args, sample):\n    return 3\n",
        ("int: 3",),
    ),
)

ROLLOUTS = (
    Wrong(
        "generate returns None",
        _GENERATE,
        "async def hook(args, sample, sampling_params):\n    sample.response = 'x'\n",
        ("NoneType",),
    ),
    Wrong(
        "generate does nothing",
        _GENERATE,
        "async def hook(args, sample, sampling_params):\n    return sample\n",
        ("PENDING",),
    ),
    Wrong(
        "generate forgets the mask of observed tokens",
        _GENERATE,
        """
        async def hook(call):
            sample = await call.default(call.sample, call.sampling)
            sample.tokens += [5, 6]
            sample.response_length += 2
            return sample
        """,
        ("loss_mask", "append_response_tokens"),
    ),
    Wrong(
        "generate sets a text and no tokens",
        _GENERATE,
        """
        async def hook(args, sample, sampling_params):
            sample.response, sample.status = "four", sample.Status.COMPLETED
            return sample
        """,
        ("'four'", "response_length 0"),
    ),
    Wrong(
        "generate gives no logprobs where they are needed",
        _GENERATE,
        """
        async def hook(call):
            sample = await call.default(call.sample, call.sampling)
            sample.rollout_log_probs = None
            return sample
        """,
        ("rollout_log_probs",),
        flags=_TIS,
    ),
    Wrong(
        "rollout returns None",
        "rollout_function",
        "def hook(args, rollout_id, data_source):\n    data_source.get_samples(2)\n",
        ("NoneType",),
    ),
    Wrong(
        "rollout gives no rewards",
        "rollout_function",
        """
        def hook(args, rollout_id, data_source, evaluation=False):
            groups = data_source.get_samples(2)
            for sample in (sample for group in groups for sample in group):
                sample.append_response_tokens(tokens=[5], log_probs=[-0.1], text="x")
                sample.status = sample.Status.COMPLETED
            return groups
        """,
        ("without a reward",),
    ),
    Wrong(
        "rollout function knows no evaluation",
        "rollout_function",
        """
        def hook(args, rollout_id, data_source, evaluation=False):
            groups = data_source.get_samples(2)
            for sample in (sample for group in groups for sample in group):
                sample.append_response_tokens(tokens=[5], log_probs=[-0.1], text="x")
                sample.status, sample.reward = sample.Status.COMPLETED, 1.0
            return groups
        """,
        ("in evaluation", "--eval-function-path"),
        flags=("--eval-interval", "1"),
    ),
    Wrong(
        "evaluation returns a list",
        "eval_function",
        "def hook(args, rollout_id, data_source, evaluation=True):\n    return [0.5]\n",
        ("list", "data"),
    ),
    Wrong(
        "evaluation misspells a column",
        "eval_function",
        """
        def hook(args, rollout_id, data_source, evaluation=True):
            return {"held": {"reward": [0.5], "truncated": [False]}}
        """,
        ("'held'", "'reward', 'truncated', neither 'rewards'"),
    ),
    Wrong(
        "rollout function counts more response tokens than there are tokens",
        "rollout_function",
        """
        def hook(args, rollout_id, data_source, evaluation=False):
            groups = data_source.get_samples(2)
            for sample in (sample for group in groups for sample in group):
                sample.tokens, sample.response_length, sample.reward = [5, 6, 7], 9, 1.0
            return groups
        """,
        ("3 tokens with response_length 9",),
    ),
    Wrong(
        "data source gives fewer groups than asked for",
        "data_source",
        """
        from dovetail.types import Sample
        class hook:
            def __init__(self, args): pass
            def get_samples(self, num_samples): return [[Sample(index=0, group_index=0)]]
            def add_samples(self, samples): pass
            def save(self, rollout_id): pass
            def load(self, rollout_id=None): pass
        """,
        ("get_samples(2) gives 1 groups",),
    ),
    Wrong(
        "middleware gives no response",
        "router_middleware",
        "async def hook(request, call_next):\n    await call_next(request)\n",
        ("status 500",),
    ),
    Wrong(
        "log function returns its metrics",
        "custom_rollout_log_function",
        "def hook(rollout_id, args, samples, metrics, time):\n    return {'mine': 1.0}\n",
        ("dict",),
    ),
)
