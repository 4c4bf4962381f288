"""Functions that can't be loaded or called, or do not come back."""

from __future__ import annotations

from tests.loop.wrong_hooks.row import Wrong

_RM = "custom_rm"
_GENERATE = "custom_generate_function"

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
