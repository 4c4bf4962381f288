"""Functions that break the contracts of their hooks, each in one way, and what must be said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from dovetail.hooks import spec_of


@dataclass(frozen=True)
class Wrong:
    """One wrong hook: its slot, its file, and words of the verdict."""

    name: str
    slot: str
    code: str
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    attribute: str = "hook"

    def write(self, folder: Path) -> str:
        """The hook's file; the path to name it by."""
        file = folder / "wrong.py"
        file.write_text(dedent(self.code).lstrip("\n"), encoding="utf-8")
        return f"{file}:{self.attribute}"

    @property
    def flag(self) -> str:
        return spec_of(self.slot).flag


_RM, _GENERATE, _FILTER = "custom_rm", "custom_generate_function", "dynamic_sampling_filter"
_TIS = ("--use-tis",)
_LOSS = ("--loss-type", "custom_loss")

LOADING = (
    Wrong("syntax error", _RM, "def hook(sample)\n    return 1.0\n", ("wrong.py:1", "SyntaxError")),
    Wrong(
        "import error",
        _RM,
        "import no_such_package\ndef hook(sample):\n    return 1.0\n",
        ("wrong.py:1", "no_such_package"),
    ),
    Wrong(
        "no such name", _RM, "def hok(sample):\n    return 1.0\n", ("'hook'", "did you mean hok")
    ),
    Wrong("not callable", _RM, "hook = 3\n", ("int", "not a function")),
    Wrong("class without __call__", _RM, "class hook:\n    pass\n", ("has no __call__",)),
    Wrong(
        "wrong count",
        _RM,
        "def hook(prompt, answer, weight):\n    return 1.0\n",
        ("(prompt, answer, weight)", "wrong.py:1", "weight"),
    ),
    Wrong(
        "required keyword that nobody passes",
        _RM,
        "def hook(sample, *, judge):\n    return 1.0\n",
        ("requires 'judge'",),
    ),
    Wrong(
        "group form without --group-rm",
        _RM,
        "def hook(args, samples):\n    return [1.0 for _ in samples]\n",
        ("takes a group", "--group-rm"),
    ),
    Wrong(
        "data source without its methods",
        "data_source",
        "class hook:\n    def __init__(self, args): pass\n    def get_samples(self, n): pass\n",
        ("no add_samples",),
    ),
    Wrong("exits on import", _RM, "import sys\nsys.exit(3)\n", ("SystemExit", "wrong.py:2")),
)
"""Found while the function is loaded and matched."""

CRASHES = (
    Wrong("hangs on import", _RM, "import time\ntime.sleep(60)\n", ("hangs", "wrong.py:2")),
    Wrong(
        "ends the process on import",
        _RM,
        "import os\nos._exit(3)\n",
        ("ends the whole process", "loaded", "exit code 3"),
    ),
    Wrong(
        "sleeps",
        _RM,
        "import time\ndef hook(sample):\n    time.sleep(60)\n",
        ("hangs", "wrong.py:3, in hook"),
    ),
    Wrong(
        "loops for ever",
        _RM,
        "def hook(sample):\n    while True:\n        pass\n",
        ("hangs", "wrong.py:", "in hook"),
    ),
    Wrong(
        "hangs inside C, where no signal gets through",
        _RM,
        """
        import re
        def hook(sample):
            return re.match(r"(a+)+$", "a" * 40 + "b") is not None
        """,
        ("hangs", "wrong.py:3, in hook"),
    ),
    Wrong(
        "never wakes up",
        _RM,
        "import asyncio\nasync def hook(sample):\n    await asyncio.Event().wait()\n",
        ("hangs", "wrong.py:3, in hook"),
    ),
    Wrong(
        "swallows its cancellation",
        _RM,
        """
        import asyncio
        async def hook(sample):
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        """,
        ("hangs", "wrong.py:5, in hook"),
    ),
    Wrong(
        "a plain generate function sleeps in its thread",
        _GENERATE,
        "import time\ndef hook(args, sample, sampling_params):\n    time.sleep(60)\n",
        ("hangs", "wrong.py:3, in hook"),
    ),
    Wrong(
        "calls sys.exit",
        _RM,
        "import sys\ndef hook(sample):\n    sys.exit(7)\n",
        ("sys.exit(7)", "wrong.py:3"),
    ),
    Wrong(
        "ends the process",
        _RM,
        "import os\ndef hook(sample):\n    os._exit(7)\n",
        ("ends the whole process", "called", "exit code 7"),
    ),
    Wrong(
        "crashes the process",
        _RM,
        "import ctypes\ndef hook(sample):\n    ctypes.string_at(0)\n",
        ("SIGSEGV", "wrong.py:3, in hook"),
    ),
)
"""They do not come back, or take their process along."""

RAISING = (
    Wrong(
        "raises",
        _RM,
        "def hook(sample):\n    raise RuntimeError('no judge')\n",
        ("RuntimeError: no judge", "wrong.py:2, in hook"),
    ),
    Wrong(
        "looks for what samples do not have",
        _RM,
        "def hook(sample):\n    return len(sample.answer)\n",
        ("AttributeError", "'answer'", "wrong.py:2"),
    ),
    Wrong(
        "looks for what args do not have",
        _RM,
        "def hook(args, sample):\n    return args.rollout_batchsize\n",
        ("rollout_batch_size", "wrong.py:2"),
    ),
)

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

WRONG = (*LOADING, *CRASHES, *RAISING, *REWARDS, *FILTERS, *ROLLOUTS, *TRAINING)
