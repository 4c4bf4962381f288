from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from dovetail.checkpoint.hf import load_model
from tests.loop.tiny import make_model


def test_a_model_is_loaded_without_the_compiler_which_is_there_for_who_asks(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = load_model(path, "float32")(ids).logits[0, -1]

    said = _run(
        """
import sys
from dovetail.checkpoint.hf import load_model
from dovetail.run.light import light_imports
with light_imports():
    model = load_model(sys.argv[1], "float32")
assert "torch._dynamo" not in sys.modules and "torch.distributed.tensor" not in sys.modules
import torch
with torch.no_grad():
    print(model(torch.tensor([[5, 6, 7]])).logits[0, -1].tolist())
assert "torch._dynamo" not in sys.modules

import torch.distributed.tensor
from transformers.utils import is_torch_distributed_available
assert is_torch_distributed_available() == torch.distributed.is_available()
doubled = torch.compile(lambda x: x * 2 + 1, backend="eager")
assert doubled(torch.ones(2)).tolist() == [3.0, 3.0]
assert torch._dynamo.__file__
""",
        path,
    )

    torch.testing.assert_close(torch.tensor(json.loads(said)), wanted, rtol=1e-5, atol=1e-6)


def test_code_that_asks_the_compiler_for_more_while_it_is_loaded_gets_the_real_one() -> None:
    said = _run(
        """
import sys
from dovetail.run.light import light_imports
with light_imports():
    import torch._dynamo
    print(torch._dynamo.config.verbose, torch._dynamo.__file__ is not None)
    assert torch._dynamo.disable(len) is not len
assert sys.modules["torch._dynamo"].__file__ is not None
"""
    )

    assert said == "False True\n"


def _run(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
