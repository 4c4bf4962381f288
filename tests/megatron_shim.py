"""Lets megatron-core 0.16 run on a CPU over gloo: tests only, in processes of their own.

megatron-core asks CUDA where it means "the device": each patch answers for the CPU. Spawned ranks
call `install()` before they build a model; `sites()` counts what a new version has to be compared
with.
"""

import functools
import re
from importlib.util import find_spec
from pathlib import Path

import torch


class Stream:
    """Does nothing; a class, because annotations name it."""

    def __init__(self, *_, **more):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def record_event(self, *_):
        return self

    def query(self):
        return True

    def _nothing(self, *_):
        return None

    wait_stream = wait_event = record = synchronize = _nothing


class Event(Stream):
    """As `Stream`."""


FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
FACTORIES += ("zeros_like", "empty_like", "ones_like")
TYPES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}


def install():
    """Patch torch and megatron-core in this process."""
    _devices()
    _streams()
    _generators()
    _without_transformer_engine()


def on_cpu(args):
    """As `install`, for a run's ranks: its --custom-megatron-init-path."""
    install()


def _devices():
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_, **more: None
    torch.Tensor.cuda = lambda self, *_, **more: self
    own_type = torch.Tensor.type

    def type_of(self, *given, **more):
        if given or more:
            return own_type(self, *given, **more)
        return f"torch.cuda.{TYPES.get(self.dtype, 'Other')}Tensor"

    torch.Tensor.type = type_of
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory):
    @functools.wraps(factory)
    def made(*given, **more):
        device = more.get("device")
        if device is not None and torch.device(device).type == "cuda":
            more["device"] = torch.device("cpu")
        if more.get("pin_memory"):
            more["pin_memory"] = False
        return factory(*given, **more)

    return made


def _streams():
    one = Stream()
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    # Three functions: torch's compiler keys on them.
    torch.cuda.stream = lambda *_, **more: one
    torch.cuda.current_stream = lambda *_, **more: one
    torch.cuda.default_stream = lambda *_, **more: one


def _generators():
    import megatron.core.tensor_parallel.random as random

    def get(*_, **more):
        return torch.get_rng_state()

    def put(state, *_, **more):
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = random._get_cuda_rng_state = get
    torch.cuda.set_rng_state = random._set_cuda_rng_state = put
    torch.cuda.manual_seed = torch.manual_seed


def _without_transformer_engine():
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # A NameError without Transformer Engine, on any device.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def moved(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = moved


SOURCES = {
    "device": r"torch\.cuda\.current_device\(\)",
    "literal": r"device=['\"]cuda['\"]",
    "method": r"\.cuda\(",
    "type": r"\.type\(\)",
    "synchronize": r"torch\.cuda\.synchronize\(",
    "stream": r"torch\.cuda\.(Stream|Event|stream|current_stream|default_stream)\b",
    "generator": r"(_get_cuda_rng_state|_set_cuda_rng_state|torch\.cuda\.manual_seed)\(",
    "te_general_gemm": r"\bte_general_gemm\b",
    "moved": r"\bmaybe_move_tensor_to_cpu\b",
}
COUNTED = (
    "tensor_parallel",
    "pipeline_parallel",
    "distributed/*.py",
    "optimizer/*.py",
    "models/gpt",
    "models/common",
    "transformer/*.py",
    "transformer/moe",
    "dist_checkpointing",
)


def sites():
    """How often each patched thing is used in the parts of megatron-core that training runs."""
    root = Path(find_spec("megatron.core").submodule_search_locations[0])
    files = []
    for part in COUNTED:
        files += root.glob(part) if part.endswith(".py") else (root / part).rglob("*.py")
    text = "\n".join(path.read_text() for path in sorted(set(files)))
    return {name: len(re.findall(pattern, text)) for name, pattern in SOURCES.items()}
